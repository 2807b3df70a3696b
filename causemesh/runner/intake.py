"""From raw records to fresh columns: decode, hear watermarks, drop replays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from causemesh.bus.base import RawBatch
from causemesh.catalogue import WATERMARK, Catalogue
from causemesh.codec.base import BatchDecoder, Decoded
from causemesh.runner.batch import Batch
from causemesh.runner.marks import HighWaterMarks
from causemesh.runner.watermarks import WatermarkTracker


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
        batches = [await self._one(raw) for raw in raws]
        return [batch for batch in batches if len(batch) or batch.bad]

    async def _one(self, raw: RawBatch) -> Batch:
        topic = self._catalogue.topic(raw.topic)
        decoded = await self._decoder.decode(raw.values, topic.record)
        bad = dict(decoded.bad)
        for name, rows in decoded.foreign.items():
            if name == WATERMARK:
                bad |= await self._hear(raw, rows)
            else:
                bad |= dict.fromkeys(rows, f"a {name} does not belong on {raw.topic}")
        batch = Batch(raw.topic, raw.partition, decoded.frame, decoded.rows, raw, bad)
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

    async def _hear(self, raw: RawBatch, rows: Sequence[int]) -> Mapping[int, str]:
        schema = self._catalogue.controls[WATERMARK]
        decoded: Decoded = await self._decoder.decode([raw.values[row] for row in rows], schema)
        frame = decoded.frame
        at_us = frame["watermark_at"].to_physical()
        for topic, partition, at in zip(
            frame["source_topic"], frame["source_partition"], at_us, strict=True
        ):
            self._watermarks.promise((raw.topic, raw.partition), (topic, partition), at)
        return {rows[row]: reason for row, reason in decoded.bad.items()}
