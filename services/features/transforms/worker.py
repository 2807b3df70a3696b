"""Applies fetched batches of a transform's feed: decode, call, send, store; nothing is skipped."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import structlog

from causemesh.bus.base import Outbound, Producer, RawBatch
from causemesh.bus.partitioner import partitions_of
from causemesh.catalogue import NO_TENANT, Catalogue
from causemesh.clock import Clock
from causemesh.codec.base import BatchDecoder
from causemesh.derived import Transform
from causemesh.errors import Fenced, Retryable
from causemesh.faultpoints import Point, reach
from causemesh.positions import Checkpoint, Claim, PositionStore
from causemesh.runner import NEVER, Batch, Emitter
from causemesh.runner.deadletters import dead_letters
from causemesh.runner.emitter import event_ids
from causemesh.runner.intake import Intake
from causemesh.runner.marks import HighWaterMarks
from causemesh.runner.watermarks import WatermarkTracker
from services.features.transforms.applying import Applied, Applier, Given
from services.features.transforms.encoding import RecordEncoder
from services.features.transforms.loading import Event
from services.features.transforms.rows import Row, progress_key

GROUP = "features-transforms"
_log = structlog.get_logger(__name__)
Count = Callable[[str, str, int], None]
"""Adds a number to the metric of a kind and of a transform."""


class Store(Protocol):
    """The rows in memory, as the changelog topic has them."""

    def row(self, key: bytes) -> Row | None:
        """The row of a key."""

    def put(self, partition: int, key: bytes, row: Row) -> None:
        """Take over a row that is in the changelog."""


@dataclass
class _Read:
    """Events of a batch, the rows of its raw batch that they are, and rows that can't be read."""

    given: list[Given] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    bad: dict[int, str] = field(default_factory=dict)


class _Partition:
    """What is known of one partition of the feed, from its own row on."""

    def __init__(
        self, catalogue: Catalogue, decoder: BatchDecoder, feed: str, claim: Claim
    ) -> None:
        self.claim = claim
        self.input = (feed, claim.partition)
        self.watermarks = WatermarkTracker({self.input: catalogue.source_partitions(feed)})
        # rows have marks of their own, which are stored with them
        marks = HighWaterMarks(enabled=False)
        self.intake = Intake(catalogue, decoder, marks, self.watermarks)
        self.promised_us = NEVER

    def restore(self, row: Row) -> None:
        self.watermarks.load(json.loads(row.value or "[]"))

    def row(self, position: int) -> Row:
        return Row(position, {}, json.dumps(self.watermarks.dump()))


class TransformWorker:
    """One transform on all partitions of its feed that this process has."""

    def __init__(
        self,
        transform: Transform,
        applier: Applier,
        store: Store,
        *,
        catalogue: Catalogue,
        decoder: BatchDecoder,
        producer: Producer,
        emitter: Emitter,
        fence: PositionStore,
        rows: RecordEncoder,
        clock: Clock,
        count: Count,
    ) -> None:
        self.transform = transform
        self._applier = applier
        self._store = store
        self._catalogue = catalogue
        self._decoder = decoder
        self._producer = producer
        self._emitter = emitter
        self._fence = fence
        self._rows = rows
        self._clock = clock
        self._count = count
        self._partitions: dict[int, _Partition] = {}
        self._lost: set[int] = set()

    def position(self, partition: int) -> int:
        """The position on the feed up to which all is stored; -1 before the first."""
        row = self._store.row(progress_key(partition))
        return -1 if row is None else row.sequence

    def serves(self, partition: int) -> bool:
        """Whether the partition is still ours, as far as is known."""
        return partition not in self._lost

    def recovered(self) -> None:
        """Begin from the stored rows again: they were brought back, maybe of other partitions."""
        self._partitions = {}
        self._lost = set()

    async def work(self, raw: RawBatch) -> None:
        """Apply the records of one partition that are behind its position, and store that.

        A send that fails is repeated until it works. Raises Fatal where that can't help.
        """
        number = raw.partition
        stored = self.position(number)
        raw = _behind(raw, stored)
        if not len(raw):
            return
        partition = await self._partition(number)
        batch = next(iter(await partition.intake.take([raw])), None)
        read = await self._read(batch) if batch is not None else _Read()
        done = await self._applier.apply(number, read.given, self._store.row)
        reach(Point.TRANSFORM_APPLIED)
        failed = {read.rows[place]: reason for place, reason in done.failed.items()}
        dead = {**read.bad, **failed}
        await self._until_sent(lambda: self._send(partition, batch, done, dead))
        reach(Point.TRANSFORM_SENT)
        position = int(raw.positions[-1])
        if not await self._still_ours(partition, position):
            return
        rows = {**done.rows, progress_key(number): partition.row(position)}
        record = self._stored(number, rows, int(raw.appended_at_us[-1]))
        await self._until_sent(lambda: self._producer.send([record]))
        reach(Point.TRANSFORM_STORED)
        for key, row in rows.items():
            self._store.put(number, key, row)
        self._note(done, len(read.given))

    async def _partition(self, number: int) -> _Partition:
        """The partition, claimed when it is first worked on after it was assigned."""
        known = self._partitions.get(number)
        if known is None:
            claim, _ = await self._fence.claim(f"{GROUP}/{self.transform.name}", number)
            known = _Partition(self._catalogue, self._decoder, self.transform.feed, claim)
            row = self._store.row(progress_key(number))
            if row is not None:
                known.restore(row)
            self._partitions[number] = known
        return known

    async def _read(self, batch: Batch) -> _Read:
        """The events that a batch of the feed carries, in its order."""
        values = batch.frame["value"].to_list()
        types = batch.frame["event_type"].to_list()
        causes = batch.frame["cause"].to_list()
        positions, raw_rows = batch.positions.tolist(), batch.rows.tolist()
        read = _Read(bad=dict(batch.bad))
        found: dict[int, Event] = {}
        for event_type in dict.fromkeys(types):
            mine = [row for row, one in enumerate(types) if one == event_type]
            record = self._catalogue.topic(f"events.{event_type}").record
            decoded = await self._decoder.decode([values[row] for row in mine], record)
            for row, fields in zip(decoded.rows.tolist(), decoded.frame.to_dicts(), strict=True):
                found[mine[row]] = Event(event_type, fields)
            read.bad |= {raw_rows[mine[row]]: reason for row, reason in decoded.bad.items()}
        for row in sorted(found):
            cause, key = causes[row], batch.raw.keys[raw_rows[row]] or b""
            source, mark = (cause["topic"], cause["partition"]), (cause["position"], cause["index"])
            read.given.append(Given(positions[row], key, source, mark, found[row]))
            read.rows.append(raw_rows[row])
        return read

    async def _send(
        self,
        partition: _Partition,
        batch: Batch | None,
        done: Applied,
        dead: Mapping[int, str],
    ) -> None:
        """What the events led to, then what can't be handled, then how far event time is."""
        topic = self._catalogue.topic(self.transform.output)
        number = partition.input[1]
        chosen = partitions_of(done.keys, topic.partitions, unkeyed=number).tolist()
        outbound = [
            Outbound(
                topic.name,
                target,
                [done.keys[at] for at in mine],
                [done.values[at] for at in mine],
            )
            for target in range(topic.partitions)
            if (mine := [at for at, one in enumerate(chosen) if one == target])
        ]
        if outbound:
            await self._producer.send(outbound)
        letters = []
        if batch is not None and dead:
            letters = dead_letters("features", [(batch, dict(dead))])
        least_us = partition.watermarks.of_input(partition.input)
        promises = {}
        if least_us is not None and least_us > partition.promised_us:
            promises[(topic.name, *partition.input)] = least_us
        await self._emitter.send(letters, promises)
        partition.promised_us = max(partition.promised_us, least_us or NEVER)

    def _stored(self, number: int, rows: Mapping[bytes, Row], at_us: int) -> Outbound:
        """The rows as one batch for the changelog, the partition's own row last."""
        feed, state = self.transform.feed, self.transform.state
        own = progress_key(number)
        sequences = [row.sequence for row in rows.values()]
        indexes = [int(key == own) for key in rows]  # it shares its position with a table
        ids = event_ids(state, feed, number, sequences, indexes)
        values = []
        for event_id, index, row in zip(ids, indexes, rows.values(), strict=True):
            cause = {"topic": feed, "partition": number, "position": row.sequence, "index": index}
            envelope = {
                "event_id": event_id,
                "tenant_id": NO_TENANT,
                "occurred_at": at_us,
                "cause": {**cause, "origin": None},
            }
            values.append(self._rows.encode({**envelope, **row.fields()}))
        return Outbound(state, number, list(rows), values)

    async def _still_ours(self, partition: _Partition, position: int) -> bool:
        """Whether nobody has claimed the partition since; if so, nothing of it may be stored.

        The position is noted with it; what counts is the one that is stored with the tables.
        """
        checkpoint = Checkpoint({partition.input: position})
        try:
            async with self._fence.unit(partition.claim) as unit:
                await unit.commit(checkpoint)
        except Fenced as error:
            _log.warning("transform_replaced", transform=self.transform.name, reason=str(error))
            self._lost.add(partition.claim.partition)
            return False
        return True

    async def _until_sent(self, send: Callable[[], Awaitable[None]]) -> None:
        """Never past a send that failed: the next would overtake it."""
        while True:
            try:
                await send()
                return
            except Retryable as error:
                _log.warning("transform_waits", transform=self.transform.name, reason=str(error))
                await self._clock.sleep(error.retry_after)

    def _note(self, done: Applied, events: int) -> None:
        name = self.transform.name
        counts = {
            "transform_events": events - done.replays,
            "transform_outputs": len(done.values),
            "transform_replays": done.replays,
            "transform_failures": len(done.failed),
        }
        for kind, number in counts.items():
            if number:
                self._count(kind, name, number)


def _behind(raw: RawBatch, position: int) -> RawBatch:
    """The records behind `position`."""
    kept = [row for row, at in enumerate(raw.positions.tolist()) if at > position]
    if len(kept) == len(raw):
        return raw
    return RawBatch(
        raw.topic,
        raw.partition,
        raw.positions[kept],
        [raw.keys[row] for row in kept],
        [raw.values[row] for row in kept],
        raw.appended_at_us[kept],
    )


def raw_batch(topic: str, partition: int, messages: Sequence[Any]) -> RawBatch:
    """Faust's messages of one partition as the kit's decoders take them."""
    return RawBatch(
        topic,
        partition,
        np.array([one.offset for one in messages], np.int64),
        [one.key for one in messages],
        [one.value for one in messages],
        np.array([round(one.timestamp * 1e6) for one in messages], np.int64),
    )
