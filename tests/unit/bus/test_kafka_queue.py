"""The queue of one partition: order, what goes together, and who hears of a failure."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from aiokafka.codec import lz4_encode
from aiokafka.producer.message_accumulator import BatchBuilder
from aiokafka.record.default_records import DefaultRecordBatch
from hypothesis import given
from hypothesis import strategies as st

from causemesh.bus import kafka_producer
from causemesh.bus.base import Outbound
from causemesh.bus.kafka_producer import PartitionQueue
from causemesh.errors import Fatal

BATCH_RECORDS = 3
TOO_LARGE = b"too large"
_HEADER_BYTES = 61  # of a Kafka record batch; what follows is compressed as one


class Batch:
    """Holds three records; one value fits no batch."""

    def __init__(self) -> None:
        self.values: list[bytes] = []

    def append(self, *, value: bytes, **_: Any) -> object | None:
        if len(self.values) == BATCH_RECORDS or value == TOO_LARGE:
            return None
        self.values.append(value)
        return object()

    def record_count(self) -> int:
        return len(self.values)


class Broker:
    """Takes one batch after the other; refuses those that hold a refused value."""

    def __init__(self, refused: bytes = b"") -> None:
        self.batches: list[list[bytes]] = []
        self.refused = refused
        self._busy = False

    def create_batch(self) -> Batch:
        return Batch()

    async def send_batch(self, batch: Batch, topic: str, *, partition: int) -> Any:
        assert not self._busy, "a second batch while one is in flight"
        self._busy = True
        return self._acknowledged(batch)

    async def _acknowledged(self, batch: Batch) -> None:
        await asyncio.sleep(0)
        self._busy = False
        if self.refused in batch.values:
            raise OSError("refused")
        self.batches.append(batch.values)


def call(*values: bytes) -> list[Outbound]:
    return [Outbound("t", 0, [None], [value]) for value in values]


async def sent(broker: Broker, calls: list[list[Outbound]]) -> list[BaseException | None]:
    queue = PartitionQueue(broker, ("t", 0))
    results = await asyncio.gather(*map(queue.put, calls), return_exceptions=True)
    await queue.ended()
    return results


def written(broker: Broker) -> list[bytes]:
    return [value for batch in broker.batches for value in batch]


@given(st.lists(st.integers(0, 7), max_size=12))
def test_each_call_keeps_its_order_and_batches_are_filled(sizes: list[int]) -> None:
    broker = Broker()
    calls = [[b"%d.%d" % (n, row) for row in range(size)] for n, size in enumerate(sizes)]
    results = asyncio.run(sent(broker, [call(*values) for values in calls]))
    assert results == [None] * len(calls)
    assert written(broker) == [value for values in calls for value in values]
    assert len(broker.batches) == -(-sum(sizes) // BATCH_RECORDS)


def test_a_failed_batch_fails_who_is_in_it_and_nothing_goes_behind_a_gap() -> None:
    broker = Broker(refused=b"b3")
    calls = [call(b"a1"), call(b"b1", b"b2", b"b3", b"b4", b"b5", b"b6"), call(b"c1"), call(b"d1")]
    results = asyncio.run(sent(broker, calls))
    # b3 lies in the second batch, so b4 to b6 must not follow
    assert written(broker) == [b"a1", b"b1", b"b2", b"c1", b"d1"]
    assert [type(one) for one in results] == [type(None), OSError, type(None), type(None)]


def test_a_batch_that_two_callers_share_fails_both() -> None:
    broker = Broker(refused=b"b")
    results = asyncio.run(sent(broker, [call(b"a"), call(b"b"), call(b"c"), call(b"d")]))
    assert [type(one) for one in results] == [OSError, OSError, OSError, type(None)]
    assert written(broker) == [b"d"]


def test_a_record_that_fits_no_batch_is_its_callers_fault_alone() -> None:
    broker = Broker()
    results = asyncio.run(sent(broker, [call(b"a"), call(b"b", TOO_LARGE, b"c"), call(b"d")]))
    assert written(broker) == [b"a", b"b", b"d"]
    assert [type(one) for one in results] == [type(None), Fatal, type(None)]


async def test_what_can_not_be_appended_leaves_no_caller_waiting() -> None:
    """A value of the wrong type is a bug; those who were taken together hear of it, later ones go
    on."""
    broker = Broker()
    wrong = Outbound("t", 0, [None], [b"x", b"y"])  # more values than keys
    results = await asyncio.wait_for(sent(broker, [call(b"a"), [wrong]]), 5)
    assert [type(one) for one in results] == [ValueError, ValueError]
    assert await asyncio.wait_for(sent(broker, [call(b"b")]), 5) == [None]


async def test_a_cancelled_caller_holds_nobody_up() -> None:
    broker = Broker()
    queue = PartitionQueue(broker, ("t", 0))
    first, second = queue.put(call(b"a")), queue.put(call(b"b"))
    first.cancel()
    await second
    await queue.ended()
    assert b"b" in written(broker)


async def test_what_comes_while_a_batch_is_in_flight_goes_together() -> None:
    broker = Broker()
    queue = PartitionQueue(broker, ("t", 0))
    first = queue.put(call(b"a"))
    await asyncio.sleep(0)
    later = [queue.put(call(value)) for value in (b"b", b"c", b"d")]
    await asyncio.gather(first, *later)
    assert broker.batches == [[b"a"], [b"b", b"c", b"d"]]


async def test_the_broker_of_these_tests_takes_one_batch_at_a_time() -> None:
    """The control arm: without the queue two batches would be in flight, and that is noticed."""
    broker = Broker()
    first = await broker.send_batch(Batch(), "t", partition=0)
    with pytest.raises(AssertionError, match="in flight"):
        await broker.send_batch(Batch(), "t", partition=0)
    await first


def built(compression: int) -> bytes:
    """A batch as the producer builds it."""
    batch = BatchBuilder(1 << 20, compression)
    for number in range(500):
        batch.append(timestamp=1, key=b"k", value=b"value %d" % (number * 7919), headers=[])
    return bytes(batch._build())


def test_batches_are_compressed_at_the_quick_level(monkeypatch: pytest.MonkeyPatch) -> None:
    quick = built(DefaultRecordBatch.CODEC_LZ4)
    records = built(0)[_HEADER_BYTES:]
    assert lz4_encode(records, 1) in quick
    monkeypatch.setattr(kafka_producer._builder, "lz4_encode", lz4_encode)  # the control arm
    assert lz4_encode(records, 1) not in built(DefaultRecordBatch.CODEC_LZ4)
