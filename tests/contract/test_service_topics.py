"""What each service's composition root really touches is what the catalogue lets it touch.

The roots run as they are, on a broker in memory and without a database connection, up to the point
where they would serve.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import create_async_engine

from causemesh.bus.memory import MemoryBus
from causemesh.catalogue import DEADLETTERS, SERVICES, Catalogue
from causemesh.codec.registry import HttpRegistry
from causemesh.errors import Misdeclared
from causemesh.service import Service
from causemesh.settings import ServiceSettings

PROJECT = Path(__file__).parents[2] / "examples" / "flights"
BUILT = [name for name in SERVICES if importlib.util.find_spec(f"services.{name}.app")]


@dataclass
class Touched:
    """What a root declared that its service reads and writes."""

    reads: set[str] = field(default_factory=set)
    writes: set[str] = field(default_factory=set)
    served: int = 0


class Watching(Catalogue):
    """The catalogue, noting what is asked of it."""

    def require(self, service: str, *, reads: Any = (), writes: Any = ()) -> None:
        found: Touched = self.__dict__["touched"]
        found.reads |= set(reads)
        found.writes |= set(writes)
        super().require(service, reads=reads, writes=writes)

    def with_sources(self, name: str, sources: Any) -> Watching:
        changed = replace(self.topic(name), sources=tuple(sources))
        made = Watching({**self.topics, name: changed}, self.event_types, self.controls)
        made.__dict__["touched"] = self.__dict__["touched"]
        return made


def watching(catalogue: Catalogue, touched: Touched) -> Watching:
    made = Watching(catalogue.topics, catalogue.event_types, catalogue.controls, catalogue.requests)
    made.__dict__["touched"] = touched
    return made


def opener(touched: Touched, catalogue: Catalogue) -> Callable[..., Any]:
    """Stands in for `open_service`: the real Service, connected to nothing."""

    @asynccontextmanager
    async def open_service(name: str, settings: ServiceSettings) -> AsyncIterator[Service]:
        settings.token()
        bus = MemoryBus()
        for topic in catalogue.topics.values():
            bus.create(topic.name, topic.partitions)
        service = Service(
            name,
            settings,
            catalogue=watching(catalogue, touched),
            bus=bus,
            registry=HttpRegistry("http://127.0.0.1:1"),
            engine=create_async_engine("postgresql+asyncpg://nobody@127.0.0.1:1/nothing"),
        )
        yield service
        await service.close()

    return open_service


async def touched_by(
    name: str, catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> Touched:
    found = Touched()

    async def serve(*_: Any, **__: Any) -> None:
        found.served += 1

    async def nothing(*_: Any) -> None:
        """There is no database."""

    monkeypatch.setenv("CAUSEMESH_PROJECT", str(PROJECT))
    monkeypatch.setenv("CAUSEMESH_API_TOKEN", "a-token-for-the-roots")
    monkeypatch.setenv("CAUSEMESH_TRITON_MODELS", str(folder))
    monkeypatch.setenv("CAUSEMESH_STRIPE_URL", "http://127.0.0.1:1")
    monkeypatch.setattr(Service, "serve", serve)
    app = importlib.import_module(f"services.{name}.app")
    monkeypatch.setattr(app, "open_service", opener(found, catalogue))
    # billing tells what changed in its terms before it serves; that takes a database.
    monkeypatch.setattr(app, "announce_changes", nothing, raising=False)
    await app.main()
    return found


@pytest.mark.parametrize("name", BUILT)
async def test_a_root_touches_what_the_catalogue_declares(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    catalogue = Catalogue.load([PROJECT])
    found = await touched_by(name, catalogue, monkeypatch, tmp_path)
    assert found.served == 1
    declared = {
        topic.name
        for topic in catalogue.topics.values()
        if name in topic.producers and topic.form != "inbox"
    }
    assert found.writes == declared, f"{name} should write what the catalogue says, no more or less"
    assert found.reads
    assert DEADLETTERS in found.writes


@pytest.mark.parametrize("name", BUILT)
async def test_a_root_stops_at_a_topic_that_it_may_not_write(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    catalogue = Catalogue.load([PROJECT])
    found = await touched_by(name, catalogue, monkeypatch, tmp_path)
    taken = sorted(found.writes - {DEADLETTERS})[0]
    topics = {**catalogue.topics, taken: replace(catalogue.topic(taken), producers=("external",))}
    with pytest.raises(Misdeclared, match=f"{name} writes {taken} but is not"):
        await touched_by(name, replace(catalogue, topics=topics), monkeypatch, tmp_path)
