"""What the Kafka reader asks of a broker: no more than it has to, and never without an end."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Mapping
from typing import Any

import pytest
from aiokafka import TopicPartition as KafkaPartition
from aiokafka.admin import AIOKafkaAdminClient, RecordsToDelete

from causemesh.bus.base import BEFORE_FIRST, Outbound, TopicPartition
from causemesh.bus.kafka import KafkaBus
from causemesh.bus.kafka_fetch import FetchSession
from causemesh.bus.kafka_reader import KafkaReader
from causemesh.catalogue import Topic
from causemesh.errors import Gone
from tests.component.bus.test_conformance import PARTITIONS, declared, write

pytestmark = pytest.mark.servers
INVALID_EPOCH = 71


@pytest.fixture
async def bus(kafka_bootstrap: str) -> AsyncIterator[KafkaBus]:
    opened = KafkaBus(kafka_bootstrap)
    yield opened
    await opened.close()


@pytest.fixture
async def topic(bus: KafkaBus) -> str:
    name = f"reader.{uuid.uuid4().hex}"
    await created(bus, declared(name))
    return name


async def created(bus: KafkaBus, topic: Topic) -> None:
    admin = bus.admin()
    await admin.ensure([topic])
    await admin.close()


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every fetch request that is made."""
    made: list[Any] = []
    build = FetchSession.request

    def noted(self: FetchSession, after: Mapping[TopicPartition, int], max_wait_s: float) -> Any:
        request = build(self, after, max_wait_s)
        made.append(request.prepare({1: (0, 99)}))
        return request

    monkeypatch.setattr(FetchSession, "request", noted)
    return made


def named(request: Any) -> int:
    """How many partitions a request names."""
    return sum(len(partitions) for _, partitions in request.topics)


def everywhere(topic: str) -> dict[TopicPartition, int]:
    return {(topic, number): BEFORE_FIRST for number in range(PARTITIONS)}


async def values(reader: KafkaReader, count: int) -> list[bytes | None]:
    found: list[bytes | None] = []
    while len(found) < count:
        for raw in await reader.fetch(100, 5.0):
            found.extend(raw.values)
    return found


async def test_a_request_names_only_partitions_that_have_moved(
    bus: KafkaBus, topic: str, requests: list[Any]
) -> None:
    reader = bus.reader(everywhere(topic))
    for number in range(3):
        await write(bus, topic, 0, [b"%d" % number])
        assert await values(reader, 1) == [b"%d" % number]
    assert named(requests[0]) == PARTITIONS
    later = [request for request in requests[1:] if named(request)]
    assert len(later) >= 2
    assert all(named(request) == 1 for request in later)
    await reader.close()


async def test_a_session_that_the_broker_has_lost_begins_anew(
    bus: KafkaBus, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused: list[int] = []
    accept, build = FetchSession.accept, FetchSession.request
    spoilt = False

    def counted(self: FetchSession, response: Any) -> int:
        refused.append(accept(self, response))
        return refused[-1]

    def spoil_one(self: FetchSession, *fields: Any) -> Any:
        nonlocal spoilt
        if self._id and not spoilt:
            spoilt = True
            self._epoch += 7
        return build(self, *fields)

    monkeypatch.setattr(FetchSession, "accept", counted)
    monkeypatch.setattr(FetchSession, "request", spoil_one)
    reader = bus.reader(everywhere(topic))
    await write(bus, topic, 0, [b"a"])
    assert await values(reader, 1) == [b"a"]
    await write(bus, topic, 1, [b"b"])
    assert await values(reader, 1) == [b"b"]
    assert INVALID_EPOCH in refused
    await reader.close()


@pytest.mark.parametrize("patient", [True, False])
async def test_who_takes_nothing_is_read_one_answer_ahead(
    bus: KafkaBus,
    topic: str,
    requests: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    *,
    patient: bool,
) -> None:
    """The control arm goes on asking, and what it gets piles up."""
    if not patient:

        async def at_once(self: KafkaReader) -> None:
            await asyncio.sleep(0)

        monkeypatch.setattr(KafkaReader, "_taken_up", at_once)
    reader = bus.reader(everywhere(topic))
    await write(bus, topic, 0, [b"first"])
    assert await values(reader, 1) == [b"first"]
    before = len(requests)
    for number in range(10):
        await write(bus, topic, 0, [b"%d" % number])
    assert (len(requests) - before <= 1) == patient
    assert await values(reader, 10) == [b"%d" % number for number in range(10)]
    await reader.close()


async def test_a_batch_larger_than_asked_for_comes_in_parts(bus: KafkaBus, topic: str) -> None:
    await write(bus, topic, 0, [b"%d" % number for number in range(10)])
    reader = bus.reader({(topic, 0): 1})
    parts = []
    while sum(parts) < 8:
        for raw in await reader.fetch(3, 5.0):
            parts.append(len(raw))
            assert raw.positions.tolist() == [int(value or b"") for value in raw.values]
    assert parts == [3, 3, 2]
    await reader.close()


async def test_blocks_are_not_cut_at_the_end_of_a_unit(bus: KafkaBus, topic: str) -> None:
    producer = bus.producer("reader")
    for _ in range(5):
        await producer.send([Outbound(topic, 0, [b"k"] * 40, [b"v"] * 40)])
    await producer.close()
    reader = bus.reader(everywhere(topic))
    parts: list[int] = []
    while sum(parts) < 200:
        for raw in await reader.fetch(100, 5.0):
            parts.append(len(raw))
            assert all(block.payload for block in raw.blocks)
    assert max(parts) <= 120
    await reader.close()


async def test_what_was_asked_for_and_is_gone_is_told(bus: KafkaBus, topic: str) -> None:
    reader = bus.reader({(topic, 0): 1_000})
    with pytest.raises(Gone, match="no longer holds the stored position 1000"):
        await values(reader, 1)
    await reader.close()


async def test_a_log_that_was_trimmed_is_read_from_where_it_begins(
    bus: KafkaBus, topic: str, kafka_bootstrap: str
) -> None:
    await write(bus, topic, 0, [b"%d" % number for number in range(10)])
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka_bootstrap)
    await admin.start()
    await admin.delete_records({KafkaPartition(topic, 0): RecordsToDelete(before_offset=6)})
    await admin.close()
    reader = bus.reader(everywhere(topic))
    assert await values(reader, 4) == [b"6", b"7", b"8", b"9"]
    await reader.close()


async def test_topics_that_come_later_are_found(bus: KafkaBus) -> None:
    name = f"reader.{uuid.uuid4().hex}"
    reader = bus.reader(everywhere(name))
    assert await reader.fetch(1, 0.3) == []
    await created(bus, declared(name))
    await write(bus, name, 1, [b"a"])
    assert await values(reader, 1) == [b"a"]
    await reader.close()


async def test_records_that_nobody_looks_at_are_not_parsed(bus: KafkaBus, topic: str) -> None:
    producer = bus.producer("reader")
    await producer.send([Outbound(topic, 0, [b"k"] * 50, [b"v"] * 50)])
    await producer.close()
    reader = bus.reader(everywhere(topic))
    raws = []
    while not raws:
        raws = await reader.fetch(100, 5.0)
    (raw,) = raws
    assert raw.positions.tolist() == list(range(50))
    assert all(block._columns is None for block in raw.blocks)  # type: ignore[attr-defined]
    assert list(raw.keys) == [b"k"] * 50
    assert all(block._columns is not None for block in raw.blocks)  # type: ignore[attr-defined]
    await reader.close()
