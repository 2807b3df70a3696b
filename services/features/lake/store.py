"""The lake as a `PositionStore`: rows, and the positions behind them, in one Iceberg snapshot.

A unit's commit only lets its rows wait; they are committed many units at a time, because a snapshot
costs tens of milliseconds and files. That is sound as nobody is told that they are there before
they are: what a crash takes from memory lies behind the tables' positions and is read again.

Each table has positions of its own, so one unit may fill many tables without a commit over all: a
worker goes on from the least, and a table leaves out what it has. What did not decode is committed
before what did, because the table of the former says nothing about how far its topic was read.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass

import polars as pl
import structlog
from prometheus_client import Counter
from pyiceberg.catalog import Catalog

from causemesh.bus.base import BEFORE_FIRST
from causemesh.catalogue import Catalogue
from causemesh.clock import Clock
from causemesh.errors import Fenced, Retryable
from causemesh.lake.definitions import LakeDefinition
from causemesh.lake.progress import PartitionProgress
from causemesh.lake.rows import table_columns
from causemesh.positions import Checkpoint, Claim, Unit
from services.features.lake.claims import Claims
from services.features.lake.sinks import Flushed, Part, Refusal, Sink
from services.features.lake.writing import Written

_log = structlog.get_logger(__name__)
_LOOK_S = 0.1
_FULL = 2  # with so many times the rows or bytes of a commit in memory, the workers wait


@dataclass(frozen=True)
class FlushLimits:
    """When rows are committed: a table's after so many seconds or rows; the largest table's once
    all together hold so many bytes. `position_s` is for a position that moved without rows."""

    seconds: float = 30.0
    rows: int = 200_000
    size_bytes: int = 128 << 20
    position_s: float = 600.0


class LakeStore:
    """See `PositionStore`; a unit's `transaction` is a list of (table, rows).

    `groups` maps a consumer group to the topics that its stage reads.
    """

    sink = Sink

    def __init__(
        self,
        catalog: Catalog,
        catalogue: Catalogue,
        definition: LakeDefinition,
        groups: Mapping[str, Sequence[str]],
        *,
        clock: Clock,
        limits: FlushLimits,
        outcomes: Counter | None = None,
    ) -> None:
        self._groups = groups
        self._clock = clock
        self._limits = limits
        self._outcomes = outcomes
        self._sinks = {
            topic: {
                one.identifier: self.sink(
                    catalog, one, table_columns(one, catalogue.topic(topic)), clock
                )
                for one in definition.of_topic(topic)
            }
            for topic in definition.topics
        }
        self._claims = {
            group: Claims(catalog, {topic: list(self._sinks[topic].values()) for topic in topics})
            for group, topics in groups.items()
        }
        self._one = asyncio.Lock()
        self._staged: dict[tuple[str, int], int] = {}
        self._refused: dict[tuple[str, int], Refusal] = {}

    async def claim(self, group: str, partition: int) -> tuple[Claim, Checkpoint | None]:
        """See `PositionStore.claim`: raises the epoch in every table of the group's topics."""
        epoch, found = await self._claims[group].claim(partition)
        positions, marks, promises = {}, [], []
        for topic, progress in found.items():
            for sink in self._sinks[topic].values():
                sink.drop(partition)
            self._staged[(topic, partition)] = progress.position
            if progress.position != BEFORE_FIRST:
                positions[(topic, partition)] = progress.position
            marks += [[topic, partition, *row] for row in progress.marks]
            promises += [[topic, partition, *row] for row in progress.promises]
        return Claim(group, partition, epoch), Checkpoint(positions, marks, promises)

    def unit(self, claim: Claim) -> AbstractAsyncContextManager[Unit]:
        """See `PositionStore.unit`. Waits while too much waits for a commit already."""
        return self._unit(claim)

    @asynccontextmanager
    async def _unit(self, claim: Claim) -> AsyncIterator[Unit]:
        while self._full():
            await self._clock.sleep(_LOOK_S)
        self._check(claim)
        yield _LakeUnit(self, claim)

    def _all(self) -> list[Sink]:
        return [sink for sinks in self._sinks.values() for sink in sinks.values()]

    def _full(self) -> bool:
        limits, sinks = self._limits, self._all()
        held = sum(sink.held_bytes for sink in sinks)
        return held >= _FULL * limits.size_bytes or any(
            sink.rows >= _FULL * limits.rows for sink in sinks
        )

    def _check(self, claim: Claim) -> None:
        """Raises Fenced when the claim was replaced, Retryable when a table was rolled back: then
        the worker starts over from where the tables are."""
        at = f"{claim.group}[{claim.partition}]"
        for topic in self._groups[claim.group]:
            refusal = self._refused.get((topic, claim.partition))
            if refusal is None or refusal.epoch < claim.epoch:
                continue
            if refusal.replaced:
                raise Fenced(f"{at}: epoch {claim.epoch} was replaced")
            raise Retryable(f"{at}: a table of {topic} was rolled back")

    def stage(self, claim: Claim, written: Written, checkpoint: Checkpoint) -> None:
        """Let a unit's rows wait for their snapshots. Raises Fenced, Retryable."""
        self._check(claim)
        rows: dict[str, list[pl.DataFrame]] = {}
        for table, frame in written:
            rows.setdefault(table, []).append(frame)
        for topic in self._groups[claim.group]:
            source = (topic, claim.partition)
            position = checkpoint.positions.get(source, BEFORE_FIRST)
            after = self._staged[source]
            if position == after:
                continue
            progress = PartitionProgress(
                claim.epoch,
                position,
                _of(checkpoint.marks, source),
                _of(checkpoint.promises, source),
            )
            for name, sink in self._sinks[topic].items():
                frames = rows.get(name, [])
                if frames:
                    sink.add(claim.partition, Part(after, progress, frames))
                elif not sink.definition.aside:
                    sink.add(claim.partition, Part(after, progress))
            self._staged[source] = position

    async def run(self) -> None:
        """Commit what is due, until cancelled; a catalog that is away is waited for."""
        while True:
            pause_s = _LOOK_S
            for topic in self._due_topics():
                try:
                    await self._flush(topic, all_of_it=False)
                except Retryable as error:
                    _log.warning("lake_waits", topic=topic, reason=str(error))
                    pause_s = max(pause_s, error.retry_after)
            await self._clock.sleep(pause_s)

    def _due(self, sink: Sink) -> bool:
        limits = self._limits
        longest = limits.seconds if sink.holds_rows else limits.position_s
        return sink.waits_s >= longest or sink.rows >= limits.rows

    def _due_topics(self) -> list[str]:
        due = [topic for topic, sinks in self._sinks.items() if any(map(self._due, sinks.values()))]
        if not due and sum(one.size_bytes for one in self._all()) >= self._limits.size_bytes:
            due = [max(self._all(), key=lambda one: one.size_bytes).definition.topic]
        return due

    async def flush(self) -> None:
        """Commit all that waits, as at the end of the process. Raises Retryable."""
        for topic in self._sinks:
            await self._flush(topic, all_of_it=True)

    async def _flush(self, topic: str, *, all_of_it: bool) -> None:
        """One at a time, and to its end: a thread can't be cancelled."""
        await asyncio.shield(asyncio.create_task(self._commit(topic, all_of_it=all_of_it)))

    async def _commit(self, topic: str, *, all_of_it: bool) -> None:
        async with self._one:
            for sink in self._sinks[topic].values():
                wanted = all_of_it or sink.holds_rows or self._due(sink)
                if wanted and sink.take():
                    self._note(topic, sink, await asyncio.to_thread(sink.flush))

    def _note(self, topic: str, sink: Sink, done: Flushed) -> None:
        table = sink.definition.identifier
        for partition, refusal in done.refused.items():
            before = self._refused.get((topic, partition))
            if before is None or before.epoch <= refusal.epoch:
                self._refused[(topic, partition)] = refusal
            _log.info("lake_refused", table=table, partition=partition, **vars(refusal))
        if self._outcomes is not None and done.rows:
            self._outcomes.labels(table, "written").inc(done.rows)


@dataclass
class _LakeUnit:
    store: LakeStore
    claim: Claim

    def __post_init__(self) -> None:
        self.transaction: Written = []

    async def commit(self, checkpoint: Checkpoint) -> None:
        self.store.stage(self.claim, self.transaction, checkpoint)


def _of(rows: Sequence[Sequence[object]], source: tuple[str, int]) -> list[Sequence[object]]:
    """The rows of a checkpoint that are about one source, without it."""
    return [row[2:] for row in rows if (row[0], row[1]) == source]
