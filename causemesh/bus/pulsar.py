"""Pulsar through pulsar-client, whose calls block and so run in threads.

A topic is a partitioned topic; every partition is written and read under its own name, so one
producer and one reader serve one partition and order is theirs. Reading needs no subscription.
Membership is a failover subscription on a topic of the group's own that holds no records: a
subscription on the data would keep it for ever. See docs/adr/0007.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pulsar  # type: ignore[import-untyped]

from causemesh.bus.base import (
    BEFORE_FIRST,
    TRACEPARENT,
    Outbound,
    Positions,
    RawBatch,
    TopicPartition,
)
from causemesh.bus.pulsar_admin import PulsarAdmin, PulsarMembership
from causemesh.bus.pulsar_ids import packed, unpacked
from causemesh.bus.pulsar_retention import HeldPositions
from causemesh.errors import Fatal, Retryable

_OPERATION_TIMEOUT_S = 5
_SEND_TIMEOUT_MS = 15_000
_WINDOW_RECORDS, _WINDOW_BYTES = 1_000, 1_000_000  # one broker entry; its index fits 12 bits
_QUEUE = 2_000
_BLOCK_MS = 500


class PulsarBus:
    """A Pulsar cluster, by its binary and its admin address; see `Bus`."""

    def __init__(self, service_url: str, admin_url: str) -> None:
        self._service_url = service_url
        self._admin_url = admin_url
        self._client: Any = None
        self._opening = threading.Lock()
        self.held = HeldPositions(admin_url)

    def client(self) -> Any:
        """The one client of this bus, whose connection all share."""
        with self._opening:
            if self._client is None:
                self._client = pulsar.Client(
                    self._service_url,
                    operation_timeout_seconds=_OPERATION_TIMEOUT_S,
                    connection_timeout_ms=2_000,
                    logger=pulsar.FileLogger(pulsar.LoggerLevel.Error, "/dev/stderr"),
                )
        return self._client

    def reader(self, after: Mapping[TopicPartition, int]) -> PulsarReader:
        """See `Bus.reader`."""
        return PulsarReader(self, after)

    def producer(self, name: str) -> PulsarProducer:
        """See `Bus.producer`."""
        return PulsarProducer(self, name)

    def membership(self, group: str, topics: Sequence[str]) -> PulsarMembership:
        """See `Bus.membership`."""
        return PulsarMembership(self.client, self._admin_url, group, topics)

    def admin(self) -> PulsarAdmin:
        """See `Bus.admin`."""
        return PulsarAdmin(self._admin_url)

    async def close(self) -> None:
        """Close the client with all that is still open on it."""
        self.held.close()
        if self._client is not None:
            client, self._client = self._client, None
            await asyncio.to_thread(_close, client)


@contextmanager
def _retryable(doing: str) -> Iterator[None]:
    try:
        yield
    except pulsar.PulsarException as error:
        raise Retryable(
            f"{doing}: Pulsar is away or refuses: {error!r}", retry_after=1.0
        ) from error


def _close(one: Any) -> None:
    """Close a client, producer or reader; one that lost its broker has nothing left to say."""
    try:
        one.close()
    except pulsar.PulsarException:
        return


class PulsarReader:
    """See `Reader`. A thread a partition waits for records, so idle partitions cost little."""

    def __init__(self, bus: PulsarBus, after: Mapping[TopicPartition, int]) -> None:
        self._bus = bus
        self._after = dict(after)
        self._pool = ThreadPoolExecutor(max(len(after), 1), "pulsar-reader")
        self._readers: dict[TopicPartition, Any] = {}
        self._waiting: dict[TopicPartition, asyncio.Future[RawBatch | None]] = {}
        self._closed = False

    async def fetch(self, max_records: int, max_wait_s: float) -> list[RawBatch]:
        """See `Reader.fetch`. Raises Fatal when the log no longer holds the position asked for."""
        loop = asyncio.get_running_loop()
        for key in self._after:
            if key not in self._waiting:
                take = partial(self._take, key, max_records)
                self._waiting[key] = loop.run_in_executor(self._pool, take)
        waiting = self._waiting.values()
        deadline = loop.time() + max_wait_s
        done: set[asyncio.Future[RawBatch | None]] = set()
        while not done and (left := deadline - loop.time()) > 0:
            done, _ = await asyncio.wait(waiting, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if any(one.exception() or one.result() is not None for one in done):
                break
            done = set()
            self._again(loop, max_records)
        return self._collect()

    def _again(self, loop: asyncio.AbstractEventLoop, max_records: int) -> None:
        """Wait on for partitions whose wait ended without a record."""
        for key, one in self._waiting.items():
            if one.done() and one.exception() is None and one.result() is None:
                take = partial(self._take, key, max_records)
                self._waiting[key] = loop.run_in_executor(self._pool, take)

    def _collect(self) -> list[RawBatch]:
        ended = [key for key, one in self._waiting.items() if one.done()]
        taken = [self._waiting.pop(key) for key in ended]
        return [batch for one in taken if (batch := one.result()) is not None]

    def _take(self, key: TopicPartition, max_records: int) -> RawBatch | None:
        """Wait for one record and take what else has come, in a thread."""
        if self._closed:
            return None
        topic, partition = key
        with _retryable(f"reading {topic}-{partition}"):
            reader = self._readers.get(key)
            if reader is None:
                reader = self._readers[key] = self._open(key)
            messages = _drain(reader, max_records)
            # asking costs a way to the broker: not for what came alone
            more = len(messages) > 1 and bool(reader.has_message_available())
        batch = _raw(topic, partition, messages, self._after[key], more) if messages else None
        if batch is not None:
            self._after[key] = int(batch.positions[-1])
        return batch

    def _open(self, key: TopicPartition) -> Any:
        at = self._after[key]
        start = pulsar.MessageId.earliest
        name = f"{key[0]}-partition-{key[1]}"
        if at != BEFORE_FIRST:
            self._bus.held.check(name, at)
            start = pulsar.MessageId(-1, *unpacked(at))
        return self._bus.client().create_reader(name, start, receiver_queue_size=_QUEUE)

    async def close(self) -> None:
        """See `Reader.close`."""
        self._closed = True
        waiting = list(self._waiting.values())
        self._waiting.clear()
        await asyncio.to_thread(self._end)
        await asyncio.gather(*waiting, return_exceptions=True)

    def _end(self) -> None:
        self._pool.shutdown(wait=True)  # a waiting thread comes back within _BLOCK_MS
        for reader in self._readers.values():
            _close(reader)
        self._readers.clear()


def _drain(reader: Any, most: int) -> list[Any]:
    read_next = reader.read_next
    messages: list[Any] = []
    try:
        messages.append(read_next(_BLOCK_MS))
        while len(messages) < most:
            messages.append(read_next(0))
    except pulsar.Timeout:
        pass
    return messages


def _raw(
    topic: str, partition: int, messages: Sequence[Any], after: int, more: bool
) -> RawBatch | None:
    """The records behind `after`: a client that connects again may repeat some."""
    positions = packed([one.message_id() for one in messages])
    if positions[0] <= after:
        messages = [m for m, at in zip(messages, positions.tolist(), strict=True) if at > after]
        positions = positions[positions > after]
        if not messages:
            return None
    return RawBatch(
        topic,
        partition,
        positions,
        [one.partition_key().encode() or None for one in messages],
        [one.data() or _empty(one) for one in messages],
        _milliseconds(messages) * 1000,
        _traceparents([one.properties() for one in messages]),
        more=more,
    )


def _empty(message: Any) -> bytes | None:
    return None if message.has_null_value() else b""


def _milliseconds(messages: Sequence[Any]) -> Positions:
    times = (one.publish_timestamp() for one in messages)
    return np.fromiter(times, dtype=np.int64, count=len(messages))


def _traceparents(properties: Sequence[Mapping[str, str]]) -> list[bytes | None] | None:
    if not any(properties):
        return None
    found = [one.get(TRACEPARENT) for one in properties]
    return [None if one is None else one.encode() for one in found]


class PulsarProducer:
    """See `Producer`. One window in flight a partition, so a failure leaves no gap.

    Every session has a name of its own: a broker that drops duplicates would drop all that a second
    session with the first one's name, and its sequence numbers, sends.
    """

    def __init__(self, bus: PulsarBus, name: str) -> None:
        self._bus = bus
        self._name = f"{name}-{uuid.uuid4().hex[:12]}"
        self._pool = ThreadPoolExecutor(4, "pulsar-producer")
        self._producers: dict[TopicPartition, Any] = {}
        self._sessions = itertools.count()
        self._locks: dict[TopicPartition, asyncio.Lock] = {}

    async def send(self, outbound: Sequence[Outbound]) -> None:
        """See `Producer.send`."""
        by_partition: dict[TopicPartition, list[Outbound]] = {}
        for part in outbound:
            by_partition.setdefault((part.topic, part.partition), []).append(part)
        sends = [self._one(key, parts) for key, parts in by_partition.items()]
        for result in await asyncio.gather(*sends, return_exceptions=True):
            if isinstance(result, BaseException):
                raise result

    async def _one(self, key: TopicPartition, parts: Sequence[Outbound]) -> None:
        loop = asyncio.get_running_loop()
        async with self._locks.setdefault(key, asyncio.Lock()):
            await loop.run_in_executor(self._pool, self._in_order, key, parts)

    def _in_order(self, key: TopicPartition, parts: Sequence[Outbound]) -> None:
        with _retryable(f"producing to {key[0]}-{key[1]}"):
            producer = self._producers.get(key)
            if producer is None:
                producer = self._producers[key] = self._open(key)
            try:
                for window in _windows(parts):
                    _send(producer, window)
            except BaseException:
                # Its next session must not send what this one still may.
                _close(self._producers.pop(key))
                raise

    def _open(self, key: TopicPartition) -> Any:
        return self._bus.client().create_producer(
            f"{key[0]}-partition-{key[1]}",
            producer_name=f"{self._name}-{next(self._sessions)}",
            send_timeout_millis=_SEND_TIMEOUT_MS,
            compression_type=pulsar.CompressionType.LZ4,
            max_pending_messages=2 * _WINDOW_RECORDS,
            block_if_queue_full=True,
            batching_enabled=True,
            batching_max_messages=_WINDOW_RECORDS,
            batching_max_allowed_size_in_bytes=_WINDOW_BYTES + 200_000,
            batching_max_publish_delay_ms=10,
        )

    async def close(self) -> None:
        """See `Producer.close`."""
        producers = list(self._producers.values())
        self._producers.clear()
        await asyncio.to_thread(self._end, producers)

    def _end(self, producers: Sequence[Any]) -> None:
        for one in producers:
            _close(one)
        self._pool.shutdown(wait=True)


Row = tuple[bytes | None, bytes, bytes | None]


def _windows(parts: Sequence[Outbound]) -> Iterator[list[Row]]:
    window: list[Row] = []
    size = 0
    for part in parts:
        traces = part.traceparents or itertools.repeat(None, len(part.values))
        for row in zip(part.keys, part.values, traces, strict=True):
            if window and (len(window) == _WINDOW_RECORDS or size + len(row[1]) > _WINDOW_BYTES):
                yield window
                window, size = [], 0
            window.append(row)
            size += len(row[1])
    if window:
        yield window


def _send(producer: Any, window: Sequence[Row]) -> None:
    """Send a window and wait for it. Raises the client's error when a record was not written."""
    results: list[Any] = []
    whole = threading.Event()
    count = len(window)

    def told(result: Any, _: Any) -> None:
        results.append(result)
        if len(results) == count:
            whole.set()

    for key, value, trace in window:
        properties = None if trace is None else {TRACEPARENT: trace.decode()}
        producer.send_async(
            value,
            told,
            properties=properties,
            partition_key=None if key is None else key.decode(),
        )
    producer.flush()
    if not whole.wait(2 * _SEND_TIMEOUT_MS / 1000):
        raise pulsar.Timeout
    refused = {result for result in results if result != pulsar.Result.Ok}
    if pulsar.Result.MessageTooBig in refused:
        raise Fatal(
            f"a record of {max(len(row[1]) for row in window)} bytes exceeds Pulsar's limit"
        )
    if refused:
        raise Retryable(f"Pulsar did not write some records: {sorted(map(str, refused))}")
