"""From columns to records in the log: cause, id, key, partition, order."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import polars as pl

from causemesh.bus.base import Outbound, Producer, TopicPartition
from causemesh.bus.partitioner import partitions_of
from causemesh.catalogue import WATERMARK, Catalogue, Schema
from causemesh.codec.base import BatchEncoder, EncoderFactory
from causemesh.errors import Fatal, Misdeclared
from causemesh.runner.batch import Outgoing

_NAMESPACE = uuid.UUID("5f0c1f0e-6f4e-5f43-9a57-0d1c6f1f2f61").bytes
_ORIGIN = pl.Struct({"topic": pl.String, "partition": pl.Int32, "position": pl.Int64})
_NO_ORIGIN = pl.Series("origin", [None], dtype=_ORIGIN)

Traces = Mapping[TopicPartition, Mapping[int, bytes]]
"""The trace context of each traced cause, by (topic, partition) and position."""


def event_ids(
    topic: str, cause_topic: str, partition: int, positions: Sequence[int], indexes: Sequence[int]
) -> list[str]:
    """UUIDv5 of each cause (RFC 9562, 5.5): the same cause gives the same id on a topic."""
    prefix = _NAMESPACE + f"{topic}|{cause_topic}|{partition}|".encode()
    ids = []
    for position, index in zip(positions, indexes, strict=True):
        digest = bytearray(hashlib.sha1(prefix + b"%d|%d" % (position, index)).digest()[:16])
        digest[6] = digest[6] & 0x0F | 0x50
        digest[8] = digest[8] & 0x3F | 0x80
        text = digest.hex()
        ids.append(f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}")
    return ids


class Emitter:
    """Sends what one service may write, in cause order, to declared topics only."""

    def __init__(
        self,
        catalogue: Catalogue,
        encoders: EncoderFactory,
        producer: Producer,
        writes: Sequence[str],
    ) -> None:
        self._catalogue = catalogue
        self._encoders = encoders
        self._producer = producer
        self._writes = frozenset(writes)
        self._cached: dict[str, BatchEncoder] = {}

    async def send(
        self,
        outgoing: Sequence[Outgoing],
        watermarks: Mapping[tuple[str, str, int], int],
        traces: Traces | None = None,
    ) -> None:
        """Send records, then watermarks behind them; returns when all are acknowledged.

        `watermarks` maps (topic, cause topic, cause partition) to a promise in microseconds, sent
        to every partition of the topic. `traces` are the trace contexts of causes, which their
        outputs carry on. Raises Misdeclared for a topic that is not declared as
        written, Fatal when records are out of cause order, Retryable when the broker failed.
        """
        outbound: list[Outbound] = []
        for part in outgoing:
            if len(part):
                outbound.extend(await self._records(part, traces))
        for (topic, cause_topic, cause_partition), at_us in watermarks.items():
            outbound.extend(await self._watermark(topic, cause_topic, cause_partition, at_us))
        if outbound:
            await self._producer.send(outbound)

    async def _records(self, part: Outgoing, traces: Traces | None) -> list[Outbound]:
        if part.topic not in self._writes:
            raise Misdeclared(f"{part.topic} is not among the topics this service writes")
        topic = self._catalogue.topic(part.topic)
        indexes = _checked_order(part)
        encoder = await self._encoder(topic.subject, topic.record)
        values = encoder.encode(_with_envelope(part, indexes, topic.record))
        chosen = partitions_of(part.keys, topic.partitions, unkeyed=part.cause_partition)
        contexts = _contexts(part, traces) if traces else None
        return [
            Outbound(
                part.topic,
                partition,
                [part.keys[row] for row in rows],
                [values[row] for row in rows],
                contexts and [contexts[row] for row in rows],
            )
            for partition in range(topic.partitions)
            if len(rows := np.flatnonzero(chosen == partition).tolist())
        ]

    async def _watermark(
        self, name: str, cause_topic: str, cause_partition: int, at_us: int
    ) -> list[Outbound]:
        encoder = await self._encoder(WATERMARK, self._catalogue.controls[WATERMARK])
        columns = {
            "source_topic": pl.Series([cause_topic], dtype=pl.String),
            "source_partition": pl.Series([cause_partition], dtype=pl.Int32),
            "watermark_at": pl.Series([at_us], dtype=pl.Int64).cast(pl.Datetime("us", "UTC")),
        }
        value = encoder.encode(pl.DataFrame(columns))
        partitions = self._catalogue.topic(name).partitions
        return [Outbound(name, partition, [None], value) for partition in range(partitions)]

    async def _encoder(self, subject: str, schema: Schema) -> BatchEncoder:
        encoder = self._cached.get(subject)
        if encoder is None:
            encoder = self._cached[subject] = await self._encoders.encoder(subject, schema)
        return encoder


def _contexts(part: Outgoing, traces: Traces) -> list[bytes | None] | None:
    """The trace context of each row's cause; None when no row has one. Positions are in order."""
    of_source = traces.get((part.cause_topic, part.cause_partition))
    if not of_source:
        return None
    contexts: list[bytes | None] = [None] * len(part)
    causes = list(of_source)
    begins = np.searchsorted(part.positions, causes, side="left").tolist()
    ends = np.searchsorted(part.positions, causes, side="right").tolist()
    for context, begin, end in zip(of_source.values(), begins, ends, strict=True):
        contexts[begin:end] = [context] * (end - begin)
    return contexts if any(contexts) else None


def _checked_order(part: Outgoing) -> npt.NDArray[np.int32]:
    positions = part.positions
    indexes = part.indexes if part.indexes is not None else np.zeros(len(part), dtype=np.int32)
    step = np.diff(positions)
    rising = (step > 0) | ((step == 0) & (np.diff(indexes) > 0))
    if not rising.all():
        row = int(np.flatnonzero(~rising)[0])
        raise Fatal(
            f"{part.topic}: row {row + 1} (cause {positions[row + 1]}.{indexes[row + 1]})"
            f" comes after {positions[row]}.{indexes[row]}; outputs must be in cause order"
        )
    return indexes


def _with_envelope(part: Outgoing, indexes: npt.NDArray[np.int32], record: Schema) -> pl.DataFrame:
    count = len(part)
    nothing = _NO_ORIGIN.new_from_index(0, count)
    # Built as columns: an expression over them costs more than all the rest on a single row.
    cause = pl.DataFrame(
        [
            pl.Series("topic", [part.cause_topic]).new_from_index(0, count),
            pl.Series("partition", [part.cause_partition], dtype=pl.Int32).new_from_index(0, count),
            pl.Series("position", part.positions, dtype=pl.Int64),
            pl.Series("index", indexes, dtype=pl.Int32),
            nothing if part.origins is None else part.origins.cast(_ORIGIN).alias("origin"),
        ]
    ).to_struct("cause")
    columns = {column.name: column for column in part.frame.get_columns()}
    columns["cause"] = cause
    if "event_id" not in columns:
        ids = event_ids(
            part.topic,
            part.cause_topic,
            part.cause_partition,
            part.positions.tolist(),
            indexes.tolist(),
        )
        columns["event_id"] = pl.Series("event_id", ids, dtype=pl.String)
    return pl.DataFrame([columns[field["name"]] for field in record["fields"]])
