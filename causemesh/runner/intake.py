"""From raw records to fresh columns: decode, hear watermarks, drop replays."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from causemesh.bus.base import Positions, RawBatch
from causemesh.catalogue import WATERMARK, Catalogue
from causemesh.codec.base import BatchDecoder, Decoded
from causemesh.runner.batch import NEVER, Batch
from causemesh.runner.marks import HighWaterMarks
from causemesh.runner.watermarks import WatermarkTracker
from causemesh.series import int64s

_MANY = 1_000
"""After so many records others get their turn: a group drops a member whose heartbeats are late."""
Heard = tuple[int, int]
"""A row of a raw batch and the watermark (microseconds) it announced."""


@dataclass
class IntakeCounts:
    """What came in, for metrics."""

    records: int = 0
    replays: int = 0
    bad: int = 0


class Intake:
    """Turns fetched records into batches and keeps marks and watermarks up to date."""

    def __init__(
        self,
        catalogue: Catalogue,
        decoder: BatchDecoder,
        marks: HighWaterMarks,
        watermarks: WatermarkTracker,
    ) -> None:
        self._catalogue = catalogue
        self._decoder = decoder
        self._marks = marks
        self._watermarks = watermarks
        self.counts = IntakeCounts()

    async def take(self, raws: Sequence[RawBatch]) -> list[Batch]:
        """Batches in the order fetched; one for each raw batch that holds rows or bad rows."""
        batches = []
        for raw in raws:
            batches.append(await self._one(raw))
            if len(raw) >= _MANY:
                await asyncio.sleep(0)
        return [batch for batch in batches if len(batch) or batch.bad]

    async def _one(self, raw: RawBatch) -> Batch:
        topic = self._catalogue.topic(raw.topic)
        if topic.form == "inbox":
            decoded = await self._decoder.decode(raw.values, topic.record)
        else:
            decoded = await self._decoder.decode_log(raw, topic.record)
        bad = dict(decoded.bad)
        before_us = self._watermarks.of_input((raw.topic, raw.partition))
        heard: list[Heard] = []
        for name, rows in decoded.foreign.items():
            if name == WATERMARK:
                bad |= await self._hear(raw, rows, heard)
            else:
                bad |= dict.fromkeys(rows, f"a {name} does not belong on {raw.topic}")
        promised = _in_force(len(raw), before_us, heard) if topic.form == "inbox" else None
        batch = Batch(raw.topic, raw.partition, decoded.frame, decoded.rows, raw, bad, promised)
        self.counts.records += len(raw)
        self.counts.bad += len(bad)
        return self._fresh(batch) if topic.form == "fact" else batch

    def _fresh(self, batch: Batch) -> Batch:
        if not len(batch):
            return batch
        causes = batch.frame["cause"].struct.unnest()
        keep = self._marks.fresh((batch.topic, batch.partition), causes)
        if keep.all():
            return batch
        replays = (~keep).nonzero()[0].tolist()
        self.counts.replays += len(replays)
        return batch.without(replays)

    async def _hear(
        self, raw: RawBatch, rows: Sequence[int], heard: list[Heard]
    ) -> Mapping[int, str]:
        """Take the promises in `rows`; those about the partition itself are added to `heard`."""
        schema = self._catalogue.controls[WATERMARK]
        decoded: Decoded = await self._decoder.decode([raw.values[row] for row in rows], schema)
        frame = decoded.frame
        source = (raw.topic, raw.partition)
        at_us = int64s(frame["watermark_at"]).tolist()
        for row, topic, partition, at in zip(
            decoded.rows, frame["source_topic"], frame["source_partition"], at_us, strict=True
        ):
            self._watermarks.promise(source, (topic, partition), at)
            if (topic, partition) == source:
                heard.append((rows[row], at))
        return {rows[row]: reason for row, reason in decoded.bad.items()}


def _in_force(count: int, before_us: int | None, heard: Sequence[Heard]) -> Positions:
    """The watermark in force at each of `count` rows."""
    promised = np.full(count, NEVER if before_us is None else before_us, dtype=np.int64)
    for row, at_us in heard:
        promised[row] = max(at_us, int(promised[row]))
    return np.maximum.accumulate(promised)
