"""Reading the log back: ranges of a topic as columns, replays dropped."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from causemesh.bus.base import BEFORE_FIRST, Bus, TopicPartition
from causemesh.catalogue import Catalogue
from causemesh.codec.base import BatchDecoder
from causemesh.runner.batch import Batch
from causemesh.runner.intake import Intake
from causemesh.runner.marks import HighWaterMarks
from causemesh.runner.watermarks import WatermarkTracker

_FETCH = 20_000
_WAIT_S = 0.5


@dataclass(frozen=True)
class Span:
    """Positions of one partition, `after` exclusive and `last` inclusive."""

    after: int
    last: int


class LogReader:
    """Reads what lies in topics now, or in given spans."""

    def __init__(self, bus: Bus, catalogue: Catalogue, decoder: BatchDecoder) -> None:
        self._bus = bus
        self._catalogue = catalogue
        self._decoder = decoder

    async def ends(self, topics: Sequence[str]) -> dict[TopicPartition, Span]:
        """The span from the start of each topic's partitions to their present ends."""
        admin = self._bus.admin()
        try:
            ends = await admin.ends(list(topics))
        finally:
            await admin.close()
        return {source: Span(BEFORE_FIRST, last) for source, last in ends.items()}

    async def read(self, spans: Mapping[TopicPartition, Span]) -> AsyncIterator[Batch]:
        """Batches of the spans' records, each partition in order.

        On fact topics records that repeat a cause (sent again after a crash) are dropped, judged by
        what lies inside the span. Raises Gone when the log no longer holds a span's start.
        """
        open_spans = {source: span for source, span in spans.items() if span.last > span.after}
        if not open_spans:
            return
        reader = self._bus.reader({source: span.after for source, span in open_spans.items()})
        intake = Intake(self._catalogue, self._decoder, HighWaterMarks(), WatermarkTracker({}))
        try:
            while open_spans:
                for raw in await reader.fetch(_FETCH, _WAIT_S):
                    source = (raw.topic, raw.partition)
                    if source not in open_spans:
                        continue
                    last = open_spans[source].last
                    for batch in await intake.take([raw]):
                        if len(inside := _until(batch, last)):
                            yield inside
                    if int(raw.positions[-1]) >= last:
                        del open_spans[source]
        finally:
            await reader.close()

    async def one(self, topic: str, partition: int, position: int) -> Batch | None:
        """The record at one position; None when there is none that decodes, or none yet."""
        written = (await self.ends([topic])).get((topic, partition))
        if written is None or not written.after < position <= written.last:
            return None
        async for batch in self.read({(topic, partition): Span(position - 1, position)}):
            return batch
        return None


def _until(batch: Batch, last: int) -> Batch:
    beyond = np.flatnonzero(batch.positions > last)
    return batch.without(beyond.tolist()) if len(beyond) else batch
