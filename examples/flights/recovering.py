"""When a part of the mesh works again after a disturbance: seen in what it commits, not in what it
says of itself."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from causemesh.bus.base import TopicPartition
from causemesh.errors import Fatal, Retryable
from causemesh.local.mesh import Mesh
from causemesh.positions import Checkpoint
from causemesh.positions_sql import checkpoints
from causemesh.sql import database_errors

_POLL_S = 0.02
_FIRST_S, _ALL_S = 120.0, 30.0
_BACKENDS = sa.text("SELECT pid FROM pg_stat_activity WHERE datname = :name")

Key = tuple[str, int]
"""A consumer group and a partition number."""


@dataclass(frozen=True)
class Stand:
    """What one partition's worker has committed, and under which claim."""

    epoch: int
    positions: Mapping[TopicPartition, int]

    def beyond(self, before: Stand) -> bool:
        """Whether more input is done than before."""
        return any(at > before.positions.get(source, -1) for source, at in self.positions.items())


Stands = Mapping[Key, Stand]


def moved(before: Stands, now: Stands, *, reclaimed: bool) -> set[Key]:
    """The partitions that got on; with `reclaimed` only by a worker that claimed them since.

    That guards against taking the last commit of a dying process for the first of the next.
    """
    return {
        key
        for key, stand in now.items()
        if stand.beyond(before.get(key, Stand(0, {})))
        and (not reclaimed or stand.epoch > before.get(key, Stand(0, {})).epoch)
    }


class Commits:
    """Reads services' committed positions from their databases."""

    def __init__(self, mesh: Mesh) -> None:
        url = mesh.environment()["CAUSEMESH_POSTGRES_URL"]
        self._engines = {
            service: create_async_engine(f"{url}/{service}", pool_pre_ping=True)
            for service in mesh.services
        }

    async def stands(self, service: str) -> dict[Key, Stand]:
        """Every partition of the service. Raises Retryable while the database is away."""
        table = checkpoints.c
        query = sa.select(table.group_name, table.partition, table.epoch, table.progress)
        rows = await _all(self._engines[service], query)
        return {
            (group, partition): Stand(
                epoch, {} if progress is None else Checkpoint.parse(progress, None, None).positions
            )
            for group, partition, epoch, progress in rows
        }

    async def backends(self, service: str) -> set[int]:
        """The database sessions of a service, this reader's own too."""
        rows = await _all(self._engines[service], _BACKENDS, name=service)
        return {row[0] for row in rows}

    async def gone(self, service: str, sessions: Collection[int]) -> None:
        """Wait until the sessions of an ended process are over: what it had asked for is then
        done or undone."""
        mine = await _own(self._engines[service])
        left = set(sessions) - mine
        while left:
            left &= await self.backends(service)
            await asyncio.sleep(_POLL_S)

    async def close(self) -> None:
        """Close every connection."""
        for engine in self._engines.values():
            await engine.dispose()


async def _all(engine: AsyncEngine, query: Any, **values: object) -> Sequence[Any]:
    async with database_errors(), engine.connect() as connection:
        return (await connection.execute(query, values)).all()


async def _own(engine: AsyncEngine) -> set[int]:
    """This reader's sessions: it has one, as it asks one thing at a time."""
    return {row[0] for row in await _all(engine, sa.text("SELECT pg_backend_pid()"))}


class Recovery:
    """The time from a disturbance to new committed work of one service.

    `begin` starts the clock; `since` names the state from which work is new; `wait` measures.
    """

    def __init__(self, commits: Commits, service: str) -> None:
        self._commits = commits
        self._service = service
        self._began = time.monotonic()
        self._before: Stands = {}

    async def since_now(self) -> None:
        """What is committed now is old. Waits for a database that is away."""
        while True:
            try:
                self._before = await self._commits.stands(self._service)
            except Retryable:
                await asyncio.sleep(_POLL_S)
            else:
                return

    async def work(self, *, reclaimed: bool) -> dict[str, float | None]:
        """Seconds from the beginning to the first claim, the first new commit, and a new commit of
        every partition.

        None for a claim that nobody had to make, and for the last when some partition got nothing
        to do for long. Raises Fatal when there was no new commit at all.
        """
        times: dict[str, float | None] = dict.fromkeys(("claimed_s", "work_s", "all_s"))
        seen: set[Key] = set()
        while times["all_s"] is None and self._may_wait(times["work_s"]):
            now = await self._now()
            seen |= moved(self._before, now, reclaimed=reclaimed)
            happened = {
                "claimed_s": any(
                    key in now and now[key].epoch > stand.epoch
                    for key, stand in self._before.items()
                ),
                "work_s": bool(seen),
                "all_s": bool(now) and seen >= now.keys() | self._before.keys(),
            }
            for name, is_so in happened.items():
                if is_so and times[name] is None:
                    times[name] = round(self.passed(), 2)
            await asyncio.sleep(_POLL_S)
        return times

    def _may_wait(self, first_s: float | None) -> bool:
        if first_s is not None:
            return self.passed() - first_s < _ALL_S
        if self.passed() > _FIRST_S:
            raise Fatal(f"{self._service} committed nothing new in {_FIRST_S:.0f} s")
        return True

    async def _now(self) -> Stands:
        """Nothing while the database is away."""
        try:
            return await self._commits.stands(self._service)
        except Retryable:
            return {}

    async def reclaimed(self) -> float:
        """Seconds until every partition was claimed anew: the broker gave them away. Raises
        Fatal."""
        while True:
            now = await self._now()
            if now and all(now[key].epoch > one.epoch for key, one in self._before.items()):
                return round(self.passed(), 2)
            if self.passed() > _FIRST_S:
                raise Fatal(f"nobody took {self._service}'s partitions in {_FIRST_S:.0f} s")
            await asyncio.sleep(_POLL_S)

    def passed(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self._began
