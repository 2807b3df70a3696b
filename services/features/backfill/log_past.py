"""What the log still holds of an event topic: where it begins, and its records up to a position."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import numpy as np

from causemesh.bus.base import BEFORE_FIRST, Bus, RawBatch, TopicPartition
from causemesh.catalogue import Catalogue
from causemesh.codec.base import BatchDecoder
from causemesh.runner import Batch
from causemesh.runner.intake import Intake
from causemesh.runner.marks import HighWaterMarks
from causemesh.runner.watermarks import WatermarkTracker

_FETCH = 20_000
_WAIT_S = 0.5
_SILENT = 20
"""So many waits in which nothing came, with a broker that answers: there is nothing to come."""
Span = tuple[int, int]
"""Positions of a partition: after the one, up to the other."""


@dataclass(frozen=True)
class Beginning:
    """Where the log of a partition begins now.

    `position`: of its first record; `since_us`: the least event time of the first records that
    hold events, None when there are none up to where was looked.
    """

    position: int
    since_us: int | None


class LogPast:
    """Reads event topics from their beginning or behind a position."""

    def __init__(self, bus: Bus, catalogue: Catalogue, decoder: BatchDecoder) -> None:
        self._bus = bus
        self._catalogue = catalogue
        self._decoder = decoder

    async def ends(self, topics: Sequence[str]) -> Mapping[TopicPartition, int]:
        """The last written position of every partition of the topics. Raises Retryable."""
        admin = self._bus.admin()
        try:
            return await admin.ends(list(topics))
        finally:
            await admin.close()

    async def beginning(self, topic: str, partition: int, last: int) -> Beginning | None:
        """Where the log begins; None when it holds nothing up to `last`. Raises Retryable."""
        first: int | None = None
        intake = self._intake([])
        async with aclosing(self._raws(topic, {partition: (BEFORE_FIRST, last)})) as raws:
            async for raw in raws:
                if first is None:
                    first = int(raw.positions[0])
                    if first > last:
                        return None
                for batch in await intake.take([raw]):
                    inside = _until(batch, last)
                    if len(inside):
                        return Beginning(first, int(inside.occurred_at_us.min()))
        return None if first is None else Beginning(first, None)

    async def batches(
        self, topic: str, spans: Mapping[int, Span], marks: list[list[Any]]
    ) -> AsyncIterator[Batch]:
        """The records of partitions behind a position up to another one, replays dropped.

        `marks` are those that belong to where the spans begin. What the log holds no more at the
        end of a span is not waited for. Raises Fatal when a span begins with a position that the
        log no longer holds, Retryable.
        """
        intake = self._intake(marks)
        async with aclosing(self._raws(topic, spans)) as raws:
            async for raw in raws:
                for batch in await intake.take([raw]):
                    inside = _until(batch, spans[batch.partition][1])
                    if len(inside):
                        yield inside

    def _intake(self, marks: list[list[Any]]) -> Intake:
        known = HighWaterMarks()
        known.load(marks)
        return Intake(self._catalogue, self._decoder, known, WatermarkTracker({}))

    async def _raws(self, topic: str, spans: Mapping[int, Span]) -> AsyncGenerator[RawBatch, None]:
        """What the broker gives of the spans; the last of each may reach beyond it."""
        left = {(topic, k): last for k, (after, last) in spans.items() if last > after}
        if not left:
            return
        reader = self._bus.reader({source: spans[source[1]][0] for source in left})
        silent = 0
        try:
            while left:
                raws = await reader.fetch(_FETCH, _WAIT_S)
                silent = 0 if raws else silent + 1
                if silent >= _SILENT:
                    await self.ends([topic])  # raises when it is the broker that is away
                    return
                for raw in raws:
                    source = (raw.topic, raw.partition)
                    if source in left:
                        yield raw
                        if int(raw.positions[-1]) >= left[source]:
                            del left[source]
        finally:
            await reader.close()


def _until(batch: Batch, last: int) -> Batch:
    beyond = np.flatnonzero(batch.positions > last)
    return batch.without(beyond.tolist()) if len(beyond) else batch
