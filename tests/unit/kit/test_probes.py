"""What a service waits for beside its runners."""

from __future__ import annotations

from sqlalchemy.ext.asyncio import create_async_engine

from causemesh.bus.memory import MemoryBus
from causemesh.catalogue import Catalogue
from causemesh.codec.registry import HttpRegistry
from causemesh.service import Service
from causemesh.settings import ServiceSettings


async def test_a_service_is_ready_when_all_that_it_waits_for_is() -> None:
    service = Service(
        "features",
        ServiceSettings(),
        catalogue=Catalogue.load(),
        bus=MemoryBus(),
        registry=HttpRegistry("http://127.0.0.1:1"),
        engine=create_async_engine("postgresql+asyncpg://nobody@127.0.0.1:1/nothing"),
    )
    waits = {"tables": "are not back yet"}
    assert await service._missing() == {}
    service.probes.append(lambda: waits)
    assert await service._missing() == waits
    waits.clear()
    assert await service._missing() == {}
    await service.close()
