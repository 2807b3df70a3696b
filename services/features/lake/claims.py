"""Claiming partitions: the epoch goes up in every table, and the positions are read with it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace

from pyiceberg.catalog import Catalog
from pyiceberg.table import Table

from causemesh.errors import MeshError, Retryable
from causemesh.faultpoints import Point, reach
from causemesh.lake.commits import Change, commit
from causemesh.lake.opening import away
from causemesh.lake.progress import PartitionProgress, TableProgress, progress_of
from causemesh.lake.tables import load
from services.features.lake.sinks import Sink

_GATHER_S = 0.05  # workers that start together share their commits
_ATTEMPTS = 20
Found = tuple[int, dict[str, PartitionProgress]]
"""An epoch, and by topic how far all its tables hold it."""


class _Overtaken(MeshError):
    """Somebody else claimed in between."""


class Claims:
    """Claims of one group, by partition number; `sinks` are those of each topic."""

    def __init__(self, catalog: Catalog, sinks: Mapping[str, Sequence[Sink]]) -> None:
        self._catalog = catalog
        self._sinks = sinks
        self._waiting: dict[int, asyncio.Future[Found]] = {}
        self._claiming: asyncio.Task[None] | None = None
        self._one = asyncio.Lock()

    async def claim(self, partition: int) -> Found:
        """Take a partition over. Raises Retryable."""
        future: asyncio.Future[Found] = asyncio.get_running_loop().create_future()
        self._waiting[partition] = future
        await asyncio.sleep(_GATHER_S)
        async with self._one:
            if not future.done():
                await self._claim_all()
        return await future

    async def _claim_all(self) -> None:
        waiting, self._waiting = self._waiting, {}
        try:
            found = await asyncio.to_thread(self._take, sorted(waiting))
        except MeshError as error:
            for future in waiting.values():
                if not future.done():
                    future.set_exception(error)
        else:
            for partition, future in waiting.items():
                if not future.done():
                    future.set_result(found[partition])

    def _take(self, partitions: Sequence[int]) -> dict[int, Found]:
        for sinks in self._sinks.values():
            for sink in sinks:
                if not sink.definition.aside:
                    sink.prepare()
        for _ in range(_ATTEMPTS):
            epochs = self._next(partitions)
            try:
                least = {topic: self._least(sinks, epochs) for topic, sinks in self._sinks.items()}
            except _Overtaken:
                continue
            reach(Point.LAKE_CLAIMED)
            return {
                number: (epoch, {topic: found[number] for topic, found in least.items()})
                for number, epoch in epochs.items()
            }
        raise Retryable("others claimed the same partitions at the same time", retry_after=1.0)

    def _next(self, partitions: Sequence[int]) -> dict[int, int]:
        """An epoch for each partition that is above those of all tables."""
        known = []
        for sinks in self._sinks.values():
            for sink in sinks:
                with away():
                    table = load(self._catalog, sink.definition.identifier)
                if table is not None:
                    known.append(progress_of(table.metadata))
        return {
            number: 1 + max((one.of(number).epoch for one in known), default=0)
            for number in partitions
        }

    def _least(
        self, sinks: Sequence[Sink], epochs: Mapping[int, int]
    ) -> dict[int, PartitionProgress]:
        """Raise the epochs in a topic's tables; returns the least progress of each partition."""
        found: list[TableProgress] = []
        for sink in sinks:
            if sink.definition.aside and self._absent(sink):
                continue  # whoever makes it finds our epoch in the other tables, or is refused
            found.append(self._raise(sink.definition.identifier, epochs))
            if sink.definition.aside:
                found.pop()
        return {
            number: min((one.of(number) for one in found), key=lambda one: one.position)
            for number in epochs
        }

    def _absent(self, sink: Sink) -> bool:
        with away():
            return load(self._catalog, sink.definition.identifier) is None

    def _raise(self, identifier: str, epochs: Mapping[int, int]) -> TableProgress:
        seen = TableProgress()

        def decide(table: Table, progress: TableProgress) -> Change:
            nonlocal seen
            if any(progress.of(number).epoch >= epoch for number, epoch in epochs.items()):
                raise _Overtaken(identifier)
            seen = progress
            raised = {
                number: replace(progress.of(number), epoch=epoch)
                for number, epoch in epochs.items()
            }
            return Change(progress.having(raised))

        commit(self._catalog, identifier, decide)
        return seen
