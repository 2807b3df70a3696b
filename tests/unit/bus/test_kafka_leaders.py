"""A partition that moves to another broker is read on there; one that is away is waited for."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka.errors import KafkaConnectionError

from causemesh.bus.base import BEFORE_FIRST
from causemesh.bus.kafka_reader import KafkaReader
from tests.unit.record_batches import record_batch

NOT_LEADER = 6
COUNT = 30


class TwoBrokers:
    """One partition, led by broker 1 until `lead` moves it; metadata is told when asked for."""

    def __init__(self) -> None:
        self.batches = [record_batch([b"%d" % n], base=n) for n in range(COUNT)]
        self.leader: int | None = 1
        self.known: int | None = 1
        self.away: set[int] = set()
        self.asked: list[int] = []
        self._offset = 0
        self.cluster = self

    def leader_for_partition(self, _: Any) -> int | None:
        return self.known

    async def force_metadata_update(self) -> bool:
        await asyncio.sleep(0)
        self.known = self.leader
        return True

    def set_topics(self, _: Any) -> None: ...

    async def bootstrap(self) -> None: ...

    async def close(self) -> None: ...

    async def send(self, node: int, request: Any) -> Any:
        await asyncio.sleep(0.001)
        self.asked.append(node)
        if node in self.away:
            raise KafkaConnectionError(f"broker {node} is away")
        fetch = request.prepare({1: (0, 99)})
        for _, partitions in fetch.topics:  # as in a session: the last offset that was named
            self._offset = partitions[0][2]
        error = 0 if node == self.leader else NOT_LEADER
        records = b"" if error else b"".join(self.batches[self._offset : self._offset + 1])
        told = [("t", [(0, error, 0, 0, 0, None, -1, records)])]
        return SimpleNamespace(error_code=0, session_id=0, topics=told)


@pytest.fixture
def brokers(monkeypatch: pytest.MonkeyPatch) -> TwoBrokers:
    made = TwoBrokers()
    monkeypatch.setattr("causemesh.bus.kafka_reader.AIOKafkaClient", lambda **_: made)
    monkeypatch.setattr("causemesh.bus.kafka_reader._AGAIN_S", 0.001)
    return made


async def read(reader: KafkaReader, count: int) -> list[bytes | None]:
    found: list[bytes | None] = []
    while len(found) < count:
        raws = await reader.fetch(100, 1.0)
        assert raws, "nothing came for a second"
        found += [value for raw in raws for value in raw.values]
    return found


async def test_reading_goes_on_where_a_partition_has_moved(brokers: TwoBrokers) -> None:
    reader = KafkaReader("b", {("t", 0): BEFORE_FIRST})
    found = await read(reader, 5)
    brokers.leader = 2
    found += await read(reader, COUNT - len(found))
    assert found == [b"%d" % n for n in range(COUNT)]
    assert set(brokers.asked) == {1, 2}
    await reader.close()


async def test_a_partition_without_a_leader_is_waited_for(brokers: TwoBrokers) -> None:
    brokers.leader = brokers.known = None
    reader = KafkaReader("b", {("t", 0): BEFORE_FIRST})
    assert await reader.fetch(100, 0.05) == []
    brokers.leader = 2
    assert await read(reader, 1) == [b"0"]
    await reader.close()


async def test_a_broker_that_is_away_is_asked_again(brokers: TwoBrokers) -> None:
    reader = KafkaReader("b", {("t", 0): BEFORE_FIRST})
    found = await read(reader, 3)
    brokers.away = {1}
    while raws := await reader.fetch(100, 0.05):  # what was under way
        found += [value for raw in raws for value in raw.values]
    brokers.away = set()
    found += await read(reader, COUNT - len(found))
    assert found == [b"%d" % n for n in range(COUNT)]
    await reader.close()
