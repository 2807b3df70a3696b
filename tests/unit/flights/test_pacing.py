"""The producer goes on while a disturbance lasts, and comes to the end only after the last."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest

from causemesh.catalogue import SERVICES
from causemesh.errors import Fatal, Misdeclared
from examples.flights.disturbing import Disturbances


class _Mesh:
    services = SERVICES
    home = Path()

    def environment(self) -> dict[str, str]:
        return {"CAUSEMESH_POSTGRES_URL": "postgresql+asyncpg://nobody@127.0.0.1:1"}


class _Quick(random.Random):
    def uniform(self, a: float, b: float) -> float:
        return 0.01


class _Held(Disturbances):
    """Each disturbance lasts until it is let go."""

    def __init__(self, names: list[str]) -> None:
        mesh: Any = _Mesh()
        super().__init__(names, mesh, lambda name, state: None, 1)
        self._random = _Quick()
        self.over = asyncio.Semaphore(0)

    async def _disturb(self, kind: str, what: str) -> dict[str, Any]:
        await self.over.acquire()
        if what == "drift":
            raise Fatal("drift stays away")
        return {"work_s": 0.1}


async def test_each_disturbance_holds_its_part_of_the_replay() -> None:
    held = _Held(["features", "billing"])
    await held.begin()
    await asyncio.wait_for(held.pace(0.45), 5.0)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(held.pace(0.55), 0.3)
    held.over.release()
    await asyncio.wait_for(held.pace(0.95), 5.0)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(held.pace(1.0), 0.3)
    held.over.release()
    await asyncio.wait_for(held.pace(1.0), 5.0)
    assert [one["what"] for one in await held.finish()] == ["features", "billing"]
    await held.release()


async def test_a_disturbance_that_fails_ends_the_replay() -> None:
    held = _Held(["drift"])
    await held.begin()
    held.over.release()
    with pytest.raises(Fatal, match="drift stays away"):
        await asyncio.wait_for(held.pace(1.0), 5.0)
    await held.release()


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(Misdeclared, match="nobody"):
        _Held(["nobody"])
