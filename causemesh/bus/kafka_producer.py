"""Writing to Kafka by prebuilt record batches: one append in C a record, one future a batch.

A partition takes one batch at a time, so that a failure leaves no gap. What is sent to it meanwhile
waits and goes together in the next batch: many callers of one record each cost a few requests, not
one each, and none is overtaken for ever (aiokafka wakes all that wait for a partition and lets one
through).
"""

from __future__ import annotations

import asyncio
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from aiokafka import AIOKafkaProducer
from aiokafka.codec import lz4_encode
from aiokafka.errors import KafkaError
from aiokafka.record.default_records import DefaultRecordBatchBuilder

from causemesh.bus.base import TRACEPARENT, Outbound, TopicPartition
from causemesh.bus.kafka_clients import started
from causemesh.errors import Fatal, Retryable

MAX_BATCH_BYTES = 1_900_000  # under the topics' max.message.bytes, above the largest value
_REQUEST_TIMEOUT_MS = 15_000
Row = tuple[bytes | None, bytes, list[tuple[str, bytes]]]

# aiokafka has no setting for the level and takes 9: 2 to 5 microseconds a record, more than all
# else that is done to one here. Level 1 takes a tenth of that, for logs that are a third larger
# (benchmarks/compression.py). Where batches are built the function is looked up at each call; the
# version is pinned, and a test holds that it is this one.
_builder: Any = sys.modules[DefaultRecordBatchBuilder.__module__]
_builder.lz4_encode = partial(lz4_encode, level=1)


class KafkaProducer:
    """See `Producer`; idempotent."""

    def __init__(self, bootstrap: str, name: str) -> None:
        self._bootstrap = bootstrap
        self._name = name
        self._session: _Session | None = None
        self._opening = asyncio.Lock()
        self._leaving: set[asyncio.Task[None]] = set()

    async def send(self, outbound: Sequence[Outbound]) -> None:
        """See `Producer.send`."""
        session = await self._opened()
        by_partition: dict[TopicPartition, list[Outbound]] = {}
        for part in outbound:
            by_partition.setdefault((part.topic, part.partition), []).append(part)
        sends = [session.queue(key).put(parts) for key, parts in by_partition.items()]
        for result in await asyncio.gather(*sends, return_exceptions=True):
            if isinstance(result, KafkaError):
                self._give_up(session)
                raise Retryable(f"producing failed: {result!r}") from result
            if isinstance(result, BaseException):
                raise result

    def _give_up(self, session: _Session) -> None:
        """Begin a new session: the failed batch had sequence numbers that the broker may never have
        seen, and it would refuse all that follow them."""
        if self._session is session:
            self._session = None
            leaving = asyncio.create_task(session.close())
            self._leaving.add(leaving)
            leaving.add_done_callback(self._leaving.discard)

    async def _opened(self) -> _Session:
        async with self._opening:
            if self._session is None:
                producer = AIOKafkaProducer(
                    bootstrap_servers=self._bootstrap,
                    client_id=self._name,
                    enable_idempotence=True,
                    compression_type="lz4",
                    max_batch_size=MAX_BATCH_BYTES,
                    max_request_size=MAX_BATCH_BYTES + 65_536,
                    request_timeout_ms=_REQUEST_TIMEOUT_MS,
                )
                await started(producer)
                self._session = _Session(producer)
        return self._session

    async def close(self) -> None:
        """See `Producer.close`."""
        await asyncio.gather(*self._leaving, return_exceptions=True)
        if self._session is not None:
            session, self._session = self._session, None
            await session.close()


class _Session:
    """One idempotent producer and what waits for its partitions."""

    def __init__(self, producer: Any) -> None:
        self._producer = producer
        self._queues: dict[TopicPartition, PartitionQueue] = {}

    def queue(self, to: TopicPartition) -> PartitionQueue:
        if to not in self._queues:
            self._queues[to] = PartitionQueue(self._producer, to)
        return self._queues[to]

    async def close(self) -> None:
        """Stop; what still waits in a queue fails by it."""
        await self._producer.stop()
        for queue in self._queues.values():
            await queue.ended()


@dataclass
class _Item:
    """What one call sends to one partition."""

    parts: Sequence[Outbound]
    outcome: asyncio.Future[None]

    def rows(self) -> Iterator[Row]:
        for part in self.parts:
            traces = part.traceparents or itertools.repeat(None, len(part.values))
            for key, value, trace in zip(part.keys, part.values, traces, strict=True):
                yield key, value, [(TRACEPARENT, trace)] if trace else []

    def settle(self, error: Exception | None) -> None:
        if self.outcome.done():  # the caller was cancelled
            return
        if error is None:
            self.outcome.set_result(None)
        else:
            self.outcome.set_exception(error)


class PartitionQueue:
    """Sends to one partition, whole batches one after the other."""

    def __init__(self, producer: Any, to: TopicPartition) -> None:
        self._producer = producer
        self._topic, self._partition = to
        self._waiting: list[_Item] = []
        self._running: asyncio.Task[None] | None = None

    def put(self, parts: Sequence[Outbound]) -> asyncio.Future[None]:
        """Queue one call's records; the future is settled when all of them are."""
        item = _Item(parts, asyncio.get_running_loop().create_future())
        self._waiting.append(item)
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._run())
        return item.outcome

    async def ended(self) -> None:
        """Wait until nothing is left to send."""
        if self._running is not None:
            await self._running

    async def _run(self) -> None:
        while self._waiting:
            items, self._waiting = self._waiting, []
            try:
                await self._write(items)
            except Exception as error:  # noqa: BLE001 - a caller's; nobody may wait for ever
                for item in items:
                    item.settle(error)

    async def _write(self, items: Sequence[_Item]) -> None:
        """Write items behind each other. One that fails half-way is left there; the others, of
        other callers, go on."""
        batch, aboard = self._producer.create_batch(), list[_Item]()
        for item in items:
            begun = False  # whether the batch holds records of this item
            for key, value, headers in item.rows():
                if batch.append(key=key, value=value, timestamp=None, headers=headers) is None:
                    error = await self._send(batch, aboard)
                    batch, aboard = self._producer.create_batch(), []
                    if error is None or not begun:
                        error = self._first(batch, (key, value, headers))
                    if error is not None:
                        item.settle(error)
                        break
                begun = True
            else:
                aboard.append(item)
        await self._send(batch, aboard)

    def _first(self, batch: Any, row: Row) -> Exception | None:
        """Append to an empty batch; the error when the record is too large for any."""
        key, value, headers = row
        if batch.append(key=key, value=value, timestamp=None, headers=headers) is not None:
            return None
        return Fatal(f"{self._topic}: a record of {len(value)} bytes exceeds a batch")

    async def _send(self, batch: Any, complete: Sequence[_Item]) -> Exception | None:
        """Send a batch and settle the items that end in it; the error when it failed."""
        error: Exception | None = None
        if batch.record_count():
            try:
                await (
                    await self._producer.send_batch(batch, self._topic, partition=self._partition)
                )
            except Exception as failure:  # noqa: BLE001 - it is the callers' to handle
                error = failure
        for item in complete:
            item.settle(error)
        return error
