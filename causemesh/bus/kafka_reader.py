"""Reading Kafka: partitions assigned by hand, positions kept by the caller, nothing committed.

Two things are asked of aiokafka's fetcher that its consumer does not offer: records without a copy
of each, and no request that leaves busy partitions out. Its version is pinned, and tests hold both.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from aiokafka import AIOKafkaConsumer
from aiokafka import TopicPartition as KafkaPartition
from aiokafka.consumer.fetcher import FetchResult
from aiokafka.errors import KafkaError, OffsetOutOfRangeError

from causemesh.bus.base import BEFORE_FIRST, TRACEPARENT, RawBatch, TopicPartition
from causemesh.bus.kafka_clients import started
from causemesh.errors import Fatal, Retryable

_TAKEN_S = 3_600.0


class KafkaReader:
    """See `Reader`."""

    def __init__(self, bootstrap: str, after: Mapping[TopicPartition, int]) -> None:
        self._after = dict(after)
        self._bootstrap = bootstrap
        self._consumer: Any = None

    async def fetch(self, max_records: int, max_wait_s: float) -> list[RawBatch]:
        """See `Reader.fetch`. Raises Fatal when the log no longer holds the position asked for."""
        if self._consumer is None:
            self._consumer = await self._open()
        try:
            fetched = await self._take(max_records)
            if not fetched and max_wait_s > 0:
                await self._wait(max_wait_s)
                fetched = await self._take(max_records)
        except OffsetOutOfRangeError as error:
            raise Fatal(
                f"the log no longer holds the stored position: {error}; retention is shorter than"
                " the time this service was away"
            ) from error
        except KafkaError as error:
            raise Retryable(f"reading failed: {error!r}") from error
        return [_raw(source, records) for source, records in fetched.items() if records]

    async def _wait(self, at_most_s: float) -> None:
        """Until something has come. Raises KafkaError when the fetcher was told of one."""
        come = self._consumer._fetcher._create_fetch_waiter()
        try:
            await asyncio.wait([come], timeout=at_most_s)
            if come.done():
                come.result()
        finally:
            come.cancel()

    async def _take(self, max_records: int) -> Mapping[Any, Sequence[Any]]:
        """What has come, as aiokafka's decoder has it: its copy of each record for the application
        takes longer than the decoding."""
        for found in self._consumer._fetcher._records.values():
            if isinstance(found, FetchResult) and found._partition_records is not None:
                found._partition_records._consumer_record = _as_decoded
        taken: Mapping[Any, Sequence[Any]] = await self._consumer.getmany(max_records=max_records)
        return taken

    async def _open(self) -> Any:
        consumer = AIOKafkaConsumer(
            bootstrap_servers=self._bootstrap,
            group_id=None,
            enable_auto_commit=False,
            auto_offset_reset="none",
            max_partition_fetch_bytes=4 << 20,
            fetch_max_wait_ms=500,
        )
        await started(consumer)
        # After this time aiokafka asks without the partitions whose data was not taken yet, and
        # what comes on those must wait until that request has: up to `fetch_max_wait_ms`, while one
        # unit of work is long and the other topics are quiet. We always take all there is.
        consumer._fetcher._prefetch_backoff = _TAKEN_S
        partitions = {key: KafkaPartition(*key) for key in self._after}
        consumer.assign(list(partitions.values()))
        fresh = [partitions[key] for key, at in self._after.items() if at == BEFORE_FIRST]
        try:
            if fresh:
                await consumer.seek_to_beginning(*fresh)
        except BaseException as error:
            await consumer.stop()
            if isinstance(error, KafkaError):
                raise Retryable(f"seeking failed: {error!r}") from error
            raise
        for key, at in self._after.items():
            if at != BEFORE_FIRST:
                consumer.seek(partitions[key], at + 1)
        return consumer

    async def close(self) -> None:
        """See `Reader.close`."""
        if self._consumer is not None:
            consumer, self._consumer = self._consumer, None
            await consumer.stop()


def _as_decoded(source: Any, record: Any) -> Any:
    return record


def _raw(source: Any, records: Sequence[Any]) -> RawBatch:
    count = len(records)
    return RawBatch(
        source.topic,
        source.partition,
        np.fromiter((record.offset for record in records), dtype=np.int64, count=count),
        [record.key for record in records],
        [record.value for record in records],
        np.fromiter((record.timestamp for record in records), dtype=np.int64, count=count) * 1000,
        _traceparents([record.headers for record in records]),
    )


def _traceparents(headers: Sequence[Sequence[tuple[str, bytes]]]) -> list[bytes | None] | None:
    return [dict(one).get(TRACEPARENT) for one in headers] if any(headers) else None
