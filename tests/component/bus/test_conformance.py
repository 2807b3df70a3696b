"""One suite for every bus driver: what the runner relies on, on the real broker."""

from __future__ import annotations

import asyncio
import gc
import sys
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
from aiokafka import TopicPartition as KafkaPartition
from aiokafka.admin import AIOKafkaAdminClient, RecordsToDelete
from aiokafka.conn import create_conn

from causemesh.bus.base import BEFORE_FIRST, Bus, Outbound, Reader
from causemesh.bus.kafka import KafkaBus
from causemesh.bus.memory import MemoryBus
from causemesh.bus.pulsar import PulsarBus
from causemesh.catalogue import Topic
from causemesh.errors import Gone, Misdeclared, Retryable

PARTITIONS = 4


_SERVED = [pytest.param(name, marks=pytest.mark.servers) for name in ("kafka", "pulsar")]


@pytest.fixture(params=["memory", *_SERVED])
async def bus(request: pytest.FixtureRequest) -> AsyncIterator[Bus]:
    made: Bus
    if request.param == "memory":
        made = MemoryBus()
    elif request.param == "pulsar":
        endpoints = request.getfixturevalue("pulsar")
        made = PulsarBus(endpoints.pulsar_url, endpoints.pulsar_admin_url)
    else:
        made = KafkaBus(request.getfixturevalue("kafka_bootstrap"))
    yield made
    await made.close()


def declared(name: str, partitions: int = PARTITIONS) -> Topic:
    record = {"type": "record", "name": "Row", "namespace": "t", "fields": []}
    return Topic(name, "fact", record, "k", "o", (), (), (), partitions, 1, "NONE", "")


@pytest.fixture
async def topic(bus: Bus) -> str:
    name = f"conformance.{uuid.uuid4().hex}"
    admin = bus.admin()
    assert await admin.ensure([declared(name)]) == [name]
    await admin.close()
    return name


async def write(bus: Bus, topic: str, partition: int, values: list[bytes]) -> None:
    producer = bus.producer("conformance")
    half = len(values) // 2
    parts = [values[:half], values[half:]]
    await producer.send(
        [Outbound(topic, partition, [b"k"] * len(part), part) for part in parts if part]
    )
    await producer.close()


async def read(bus: Bus, after: dict[tuple[str, int], int], count: int) -> dict[Any, list[Any]]:
    """(position, value) pairs by partition, until `count` came or nothing follows for a while."""
    reader = bus.reader(after)
    seen: dict[Any, list[Any]] = {}
    quiet = 0
    while sum(map(len, seen.values())) < count and quiet < 20:
        batches = await reader.fetch(1000, 0.3)
        quiet = 0 if batches else quiet + 1
        for batch in batches:
            pairs = zip(batch.positions.tolist(), batch.values, strict=True)
            seen.setdefault((batch.topic, batch.partition), []).extend(pairs)
    await reader.close()
    return seen


async def test_records_of_a_partition_keep_their_order(bus: Bus, topic: str) -> None:
    values = [b"%d" % number for number in range(500)]
    await write(bus, topic, 1, values)
    seen = await read(bus, {(topic, 1): BEFORE_FIRST}, 500)
    assert [value for _, value in seen[(topic, 1)]] == values
    positions = [position for position, _ in seen[(topic, 1)]]
    assert positions == sorted(set(positions))


async def test_reading_goes_on_behind_a_stored_position(bus: Bus, topic: str) -> None:
    await write(bus, topic, 0, [b"%d" % number for number in range(20)])
    everything = (await read(bus, {(topic, 0): BEFORE_FIRST}, 20))[(topic, 0)]
    for at in (0, 7, 18):
        rest = await read(bus, {(topic, 0): everything[at][0]}, 19 - at)
        assert rest[(topic, 0)] == everything[at + 1 :]


async def _forget_on_kafka(bootstrap: str, topic: str, upto: int) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    await admin.delete_records({KafkaPartition(topic, 0): RecordsToDelete(upto + 1)})
    await admin.close()


def _pulsar_partition(admin_url: str, topic: str) -> httpx.AsyncClient:
    base = f"{admin_url}/admin/v2/persistent/public/default/{topic}-partition-0/"
    return httpx.AsyncClient(base_url=base, timeout=20)


async def _end_of_a_ledger(admin_url: str, topic: str) -> None:
    """Pulsar deletes whole ledgers: what is written from here on lies in another one."""
    async with _pulsar_partition(admin_url, topic) as http:
        (await http.put("unload")).raise_for_status()


async def _forget_on_pulsar(admin_url: str, topic: str) -> None:
    """Delete every ledger but the one that is written."""
    async with _pulsar_partition(admin_url, topic) as http, asyncio.timeout(20):
        (await http.delete("truncate")).raise_for_status()
        while len((await http.get("internalStats")).json()["ledgers"]) > 1:  # noqa: ASYNC110
            await asyncio.sleep(0.1)


async def _first_batch(reader: Reader) -> None:
    async with asyncio.timeout(20):
        while not await reader.fetch(10, 0.5):
            pass


@pytest.mark.parametrize("broker", _SERVED)
async def test_a_stored_position_that_was_deleted_is_noticed(
    broker: str, request: pytest.FixtureRequest
) -> None:
    """By a reader from there; not by one from what is left, or from the start."""
    endpoints = request.getfixturevalue("pulsar" if broker == "pulsar" else "cluster")
    bus: Bus = KafkaBus(endpoints.kafka_bootstrap)
    if broker == "pulsar":
        bus = PulsarBus(endpoints.pulsar_url, endpoints.pulsar_admin_url)
    topic, admin = f"conformance.{uuid.uuid4().hex}", bus.admin()
    await admin.ensure([declared(topic, 1)])
    source = (topic, 0)
    await write(bus, topic, 0, [b"0", b"1", b"2"])
    old = (await read(bus, {source: BEFORE_FIRST}, 3))[source]
    if broker == "pulsar":
        await _end_of_a_ledger(endpoints.pulsar_admin_url, topic)
    await write(bus, topic, 0, [b"3", b"4"])
    left = (await read(bus, {source: old[2][0]}, 2))[source]
    assert [value for _, value in left] == [b"3", b"4"]
    if broker == "pulsar":
        await _forget_on_pulsar(endpoints.pulsar_admin_url, topic)
    else:
        await _forget_on_kafka(endpoints.kafka_bootstrap, topic, old[2][0])
    reader = bus.reader({source: old[0][0]})
    with pytest.raises(Gone, match="no longer holds the stored position"):
        await _first_batch(reader)
    await reader.close()
    assert (await read(bus, {source: left[0][0]}, 1))[source] == left[1:]
    assert (await read(bus, {source: BEFORE_FIRST}, 2))[source] == left
    assert (await read(bus, {source: left[0][0] - 1}, 2))[source] == left
    for one in (admin, bus):
        await one.close()


async def test_a_reader_takes_only_its_partitions(bus: Bus, topic: str) -> None:
    for partition in range(PARTITIONS):
        await write(bus, topic, partition, [b"%d" % partition] * 3)
    seen = await read(bus, {(topic, 1): BEFORE_FIRST, (topic, 3): BEFORE_FIRST}, 6)
    assert {key: {value for _, value in rows} for key, rows in seen.items()} == {
        (topic, 1): {b"1"},
        (topic, 3): {b"3"},
    }


async def test_a_batch_tells_whether_the_log_holds_more(bus: Bus, topic: str) -> None:
    """A worker that is behind does not wait for records to gather."""
    await write(bus, topic, 0, [b"%d" % number for number in range(3_000)])
    reader, count, told = bus.reader({(topic, 0): BEFORE_FIRST}), 0, []
    async with asyncio.timeout(30):
        while count < 3_000:
            for batch in await reader.fetch(400, 0.5):
                count += len(batch)
                if len(batch) > 1:  # on Pulsar it is not asked for one that came alone
                    told.append((batch.more, count < 3_000))
    await reader.close()
    assert len(told) > 1
    assert [more for more, _ in told] == [behind for _, behind in told]


async def test_ends_name_the_last_record(bus: Bus, topic: str) -> None:
    await write(bus, topic, 2, [b"a", b"b", b"c"])
    admin = bus.admin()
    ends = await admin.ends([topic])
    await admin.close()
    last = (await read(bus, {(topic, 2): BEFORE_FIRST}, 3))[(topic, 2)][-1][0]
    assert ends == {(topic, 0): -1, (topic, 1): -1, (topic, 2): last, (topic, 3): -1}


async def test_ends_of_an_unknown_topic_are_retryable(bus: Bus, topic: str) -> None:
    admin = bus.admin()
    with pytest.raises(Retryable, match="nowhere"):
        await admin.ends([topic, "nowhere"])
    await admin.close()


async def test_large_sends_are_split_and_stay_in_order(bus: Bus, topic: str) -> None:
    values = [b"%d" % number + b"." * 300_000 for number in range(20)]
    await write(bus, topic, 0, values)
    seen = await read(bus, {(topic, 0): BEFORE_FIRST}, 20)
    assert [value for _, value in seen[(topic, 0)]] == values


async def test_many_callers_at_once_all_get_through_in_order(bus: Bus, topic: str) -> None:
    producer = bus.producer("conformance")

    async def caller(number: int) -> None:
        for row in range(5):
            value = b"%d.%d" % (number, row)
            await producer.send([Outbound(topic, n, [None], [value]) for n in (0, 1)])

    await asyncio.gather(*map(caller, range(50)))
    await producer.close()
    found = await read(bus, {(topic, 0): BEFORE_FIRST, (topic, 1): BEFORE_FIRST}, 500)
    for pairs in found.values():
        by_caller: dict[bytes, list[bytes]] = {}
        for _, value in pairs:
            number, _, row = value.partition(b".")
            by_caller.setdefault(number, []).append(row)
        assert len(by_caller) == 50
        assert all(rows == [b"0", b"1", b"2", b"3", b"4"] for rows in by_caller.values())


async def test_another_partition_count_is_refused(bus: Bus, topic: str) -> None:
    admin = bus.admin()
    assert await admin.ensure([declared(topic)]) == []
    with pytest.raises(Misdeclared, match="partitions"):
        await admin.ensure([declared(topic, PARTITIONS + 1)])
    await admin.close()


async def test_trace_contexts_travel_with_their_records(bus: Bus, topic: str) -> None:
    trace = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    producer = bus.producer("conformance")
    keys: list[bytes | None] = [None, None]
    await producer.send(
        [
            Outbound(topic, 0, keys, [b"a", b"b"], [None, trace]),
            Outbound(topic, 1, keys, [b"c", b"d"]),
        ]
    )
    await producer.close()
    for partition, expected in ((0, [None, trace]), (1, None)):
        reader = bus.reader({(topic, partition): BEFORE_FIRST})
        rows: list[bytes] = []
        async with asyncio.timeout(90):
            while len(rows) < 2:
                for batch in await reader.fetch(10, 0.3):
                    rows += [value for value in batch.values if value]
                    assert len(batch) == 2
                    assert batch.traceparents == expected
        await reader.close()


async def settled(member: Any, count: int) -> frozenset[int]:
    """Wait for an assignment of `count` partitions."""
    async with asyncio.timeout(90):
        while True:
            owned: frozenset[int] = await member.changed()
            if len(owned) == count:
                return owned


async def test_members_share_partitions_and_inherit_them(bus: Bus, topic: str) -> None:
    group = f"group-{uuid.uuid4().hex}"
    first = bus.membership(group, [topic])
    assert await settled(first, PARTITIONS) == frozenset(range(PARTITIONS))
    second = bus.membership(group, [topic])
    halves = await asyncio.gather(settled(first, 2), settled(second, 2))
    assert halves[0] | halves[1] == frozenset(range(PARTITIONS))
    await second.close()
    assert await settled(first, PARTITIONS) == frozenset(range(PARTITIONS))
    await first.report({(topic, 0): 41})
    admin = bus.admin()
    assert (await admin.reported(group))[(topic, 0)] == 41
    await admin.close()
    await first.close()


@pytest.mark.servers
@pytest.mark.parametrize(
    "away",
    [
        lambda: KafkaBus("127.0.0.1:1"),
        lambda: PulsarBus("pulsar://127.0.0.1:1", "http://127.0.0.1:1"),
    ],
)
async def test_a_broker_that_is_away_is_retryable(away: Callable[[], Bus]) -> None:
    bus = away()
    reader, producer, admin = bus.reader({("t", 0): BEFORE_FIRST}), bus.producer("t"), bus.admin()
    with pytest.raises(Retryable, match="away"):
        await reader.fetch(1, 30.0)
    with pytest.raises(Retryable, match="away"):
        await producer.send([Outbound("t", 0, [None], [b"x"])])
    with pytest.raises(Retryable, match="away"):
        await admin.ends(["t"])
    for one in (reader, producer, admin, bus):
        await one.close()


async def cut_off(kafka_bootstrap: str, connected: asyncio.Event) -> None:
    """A reader and an admin, each cancelled when its start has connected and awaits an answer."""
    bus = KafkaBus(kafka_bootstrap)
    reader, admin = bus.reader({("nowhere", 0): BEFORE_FIRST}), bus.admin()
    for starts in (reader.fetch(1, 0.1), admin.ends(["nowhere"])):
        connected.clear()
        starting = asyncio.ensure_future(starts)
        await connected.wait()
        starting.cancel()
        await asyncio.wait([starting])
    await reader.close()
    await admin.close()


def unclosed(
    kafka_bootstrap: str, recorded: pytest.WarningsRecorder, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """The connections to Kafka that cut-off starts leave open."""
    connected = asyncio.Event()

    async def connecting(*args: Any, **kwargs: Any) -> Any:
        connection = await create_conn(*args, **kwargs)
        connected.set()
        return connection

    monkeypatch.setattr("aiokafka.client.create_conn", connecting)
    kept: list[Any] = []
    hook, sys.unraisablehook = sys.unraisablehook, kept.append
    try:
        asyncio.run(cut_off(kafka_bootstrap, connected))
        gc.collect()
    finally:
        sys.unraisablehook = hook
    told = [str(one.exc_value) for one in kept] + [str(one.message) for one in recorded]
    return [one for one in told if "Unclosed AIOKafkaConnection" in one]


@pytest.mark.servers
@pytest.mark.parametrize("to_the_end", [True, False])
def test_a_start_that_is_cut_off_leaves_no_connection_open(
    kafka_bootstrap: str,
    recwarn: pytest.WarningsRecorder,
    monkeypatch: pytest.MonkeyPatch,
    *,
    to_the_end: bool,
) -> None:
    """The control arm lets the cancellation reach aiokafka's own start."""
    if not to_the_end:
        monkeypatch.setattr("causemesh.bus.kafka_clients.asyncio.shield", lambda started: started)
    assert (not unclosed(kafka_bootstrap, recwarn, monkeypatch)) == to_the_end
