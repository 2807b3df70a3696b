"""The outbox on real Postgres and Kafka: in order, no gap, and replays that readers drop."""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
import pytest
import sqlalchemy as sa
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind
from sqlalchemy.ext.asyncio import AsyncEngine

from causemesh.bus.base import BEFORE_FIRST, Outbound, RawBatch
from causemesh.bus.kafka import KafkaBus
from causemesh.catalogue import Catalogue
from causemesh.codec.decode import Decoder
from causemesh.codec.encode import RegistryEncoders
from causemesh.codec.registry import HttpRegistry
from causemesh.errors import Retryable
from causemesh.log import LogReader
from causemesh.outbox import Event, OutboxDrain, add_events, outbox_drains, outbox_rows
from causemesh.runner import Batch, Emitter
from causemesh.spans import UnitSpans
from causemesh.spans_sending import OutboxSpans

pytestmark = pytest.mark.servers
PARTITIONS = 3
KEYS = 7
ORIGIN = ("inference.predictions.v1", 2)

Sent = tuple[int, int, int]
"""Shard, row number, and the number of the event that a test added."""


class Wrapped:
    """A producer that can be held back, slowed down, or fail once everything is written."""

    def __init__(self, producer: Any) -> None:
        self._producer = producer
        self.close = producer.close
        self.gate = asyncio.Event()
        self.gate.set()
        self.waits = asyncio.Event()
        self.delay_s = 0.0
        self.crashes = 0

    async def send(self, outbound: Sequence[Outbound]) -> None:
        self.waits.set()
        await self.gate.wait()
        await asyncio.sleep(self.delay_s * random.random())
        await self._producer.send(outbound)
        if self.crashes:
            self.crashes -= 1
            raise Retryable("crashed between the send and the mark", retry_after=0.01)


class Outbox:
    """An outbox that drains to one topic of its own."""

    def __init__(self, bootstrap: str, registry: HttpRegistry, engine: AsyncEngine) -> None:
        core = Catalogue.load().topic("training.requests.v1")
        name = f"training.t{uuid.uuid4().hex}"
        self.topic = replace(core, name=name, partitions=PARTITIONS, compatibility="NONE")
        self.catalogue = Catalogue({name: self.topic}, {})
        self.engine = engine
        self.bus = KafkaBus(bootstrap)
        self._encoders = RegistryEncoders(registry)
        self.decoder = Decoder(registry)
        self._producers: list[Wrapped] = []

    async def create(self) -> None:
        admin = self.bus.admin()
        await admin.ensure([self.topic])
        await admin.close()

    def drain(self, spans: OutboxSpans | None = None) -> tuple[OutboxDrain, Wrapped]:
        """A drain as another process would have it, and its producer."""
        producer = Wrapped(self.bus.producer("kit"))
        self._producers.append(producer)
        emitter = Emitter(self.catalogue, self._encoders, producer, [self.topic.name])
        drain = OutboxDrain("kit", self.engine, self.catalogue, emitter, spans=spans)
        return drain, producer

    def event(self, number: int) -> Event:
        record = {
            "tenant_id": "t",
            "occurred_at": number,
            "model": "m",
            "version": number,
            "reason": "",
        }
        return Event(self.topic.name, f"k{number % KEYS}", record, (*ORIGIN, number))

    async def add(self, first: int, count: int, *, shard: int = 0) -> None:
        """Events in one transaction."""
        events = [self.event(number) for number in range(first, first + count)]
        async with self.engine.begin() as transaction:
            await add_events(transaction, events, shard=shard)

    async def log(self) -> dict[int, list[Sent]]:
        """Every record by partition, replays included."""
        admin = self.bus.admin()
        ends = await admin.ends([self.topic.name])
        await admin.close()
        found: dict[int, list[Sent]] = {partition: [] for _, partition in ends}
        left = {source for source, last in ends.items() if last > BEFORE_FIRST}
        reader = self.bus.reader(dict.fromkeys(left, BEFORE_FIRST))
        while left:
            for raw in await reader.fetch(10_000, 0.5):
                decoded = await self.decoder.decode(raw.values, self.topic.record)
                assert decoded.bad == {}
                found[raw.partition] += self.sent(decoded.frame)
                if int(raw.positions[-1]) >= ends[(raw.topic, raw.partition)]:
                    left.discard((raw.topic, raw.partition))
        await reader.close()
        return found

    @staticmethod
    def sent(frame: Any) -> list[Sent]:
        causes = frame["cause"].to_list()
        assert {cause["topic"] for cause in causes} <= {"outbox.kit"}
        numbers = frame["version"].to_list()
        return [
            (cause["partition"], cause["position"], number)
            for cause, number in zip(causes, numbers, strict=True)
        ]

    async def believed(self) -> dict[int, list[Sent]]:
        """What a reader takes, by partition: replays dropped."""
        log = LogReader(self.bus, self.catalogue, self.decoder)
        found: dict[int, list[Sent]] = {partition: [] for partition in range(PARTITIONS)}
        async for batch in log.read(await log.ends([self.topic.name])):
            found[batch.partition] += self.sent(batch.frame)
        return found

    async def close(self) -> None:
        for producer in self._producers:
            await producer.close()


@pytest.fixture
async def outbox(
    kafka_bootstrap: str, registry_url: str, database: AsyncEngine
) -> AsyncIterator[Outbox]:
    registry = HttpRegistry(registry_url)
    made = Outbox(kafka_bootstrap, registry, database)
    await made.create()
    yield made
    await made.close()
    await registry.close()


def disorder(log: dict[int, list[Sent]]) -> int:
    """How often a shard's row on a partition does not come after the one before it."""
    count = 0
    for rows in log.values():
        for shard in {shard for shard, _, _ in rows}:
            numbers = [number for one, number, _ in rows if one == shard]
            count += int((np.diff(numbers) <= 0).sum())
    return count


def rows_of(log: dict[int, list[Sent]], shard: int) -> list[int]:
    return sorted(number for rows in log.values() for one, number, _ in rows if one == shard)


def events_of(log: dict[int, list[Sent]]) -> list[int]:
    return sorted(number for rows in log.values() for _, _, number in rows)


async def waiting(engine: AsyncEngine) -> int:
    async with engine.connect() as connection:
        count = sa.select(sa.func.count()).select_from(outbox_rows)
        return int((await connection.execute(count)).scalar_one())


async def test_rows_go_out_in_commit_order_without_gaps(outbox: Outbox) -> None:
    await outbox.add(0, 3)
    await outbox.add(3, 2, shard=5)
    with suppress(KeyError):
        async with outbox.engine.begin() as transaction:
            await add_events(transaction, [outbox.event(99)])
            raise KeyError("the effect failed, so its event never was")
    await asyncio.gather(*(outbox.add(10 * n, 4) for n in range(1, 9)))
    drain, _ = outbox.drain()
    assert await drain.drain() == 37
    assert await drain.drain() == 0
    log = await outbox.log()
    assert disorder(log) == 0
    assert rows_of(log, 0) == list(range(1, 36))
    assert rows_of(log, 5) == [1, 2]
    assert events_of(log) == [*range(5), *(10 * n + k for n in range(1, 9) for k in range(4))]
    assert await waiting(outbox.engine) == 0
    assert len({number % KEYS for number in events_of(log)}) == KEYS
    assert await outbox.believed() == log


async def test_the_cause_names_the_row_and_the_origin_behind_it(outbox: Outbox) -> None:
    await outbox.add(4, 1)
    async with outbox.engine.begin() as transaction:
        await add_events(transaction, [replace(outbox.event(5), origin=None)], shard=1)
    drain, _ = outbox.drain()
    await drain.drain()
    log = LogReader(outbox.bus, outbox.catalogue, outbox.decoder)
    rows = [
        row
        async for batch in log.read(await log.ends([outbox.topic.name]))
        for row in batch.frame.to_dicts()
    ]
    by_number = {row["version"]: row for row in rows}
    shared = {"topic": "outbox.kit", "position": 1, "index": 0}
    origin = dict(zip(("topic", "partition", "position"), (*ORIGIN, 4), strict=True))
    assert by_number[4]["cause"] == {**shared, "partition": 0, "origin": origin}
    assert by_number[5]["cause"] == {**shared, "partition": 1, "origin": None}
    assert by_number[4]["event_id"] != by_number[5]["event_id"]


async def test_what_a_crash_sends_again_is_dropped_by_readers(outbox: Outbox) -> None:
    drain, producer = outbox.drain()
    await outbox.add(0, 40)
    producer.crashes = 2
    for _ in range(2):
        with pytest.raises(Retryable):
            await drain.drain()
        await outbox.add(await waiting(outbox.engine), 10)
    assert await drain.drain() == 60
    log = await outbox.log()
    assert len(events_of(log)) == 40 + 50 + 60
    assert disorder(log) > 0  # the control: without marks a reader would count these twice
    believed = await outbox.believed()
    assert events_of(believed) == list(range(60))
    assert disorder(believed) == 0


# A cancelled drain leaves its connections in whatever state they are.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_a_drain_killed_at_random_points_leaves_no_gap(outbox: Outbox) -> None:
    rng = random.Random(5)
    added = 0
    for _ in range(25):
        count = rng.randrange(1, 60)
        await outbox.add(added, count, shard=added % 2)
        added += count
        drain, producer = outbox.drain()
        producer.delay_s = 0.02
        task = asyncio.create_task(drain.run())
        await asyncio.sleep(rng.uniform(0.0, 0.08))
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
    drain, _ = outbox.drain()
    while await drain.drain():
        pass
    believed = await outbox.believed()
    assert events_of(believed) == list(range(added))
    assert disorder(believed) == 0
    for shard in (0, 1):
        rows = rows_of(believed, shard)
        assert rows == list(range(1, len(rows) + 1))
    assert await waiting(outbox.engine) == 0


async def race(outbox: Outbox) -> dict[int, list[Sent]]:
    """Four drains at once over two shards that go on filling; the log they leave."""
    tasks = []
    for _ in range(4):
        drain, producer = outbox.drain()
        producer.delay_s = 0.02
        tasks.append(asyncio.create_task(drain.run()))
    for number in range(30):
        await outbox.add(number * 10, 10, shard=number % 2)
        await asyncio.sleep(0.01)
    async with asyncio.timeout(20):
        while await waiting(outbox.engine):  # noqa: ASYNC110 - polls a database
            await asyncio.sleep(0.05)
    await asyncio.sleep(0.1)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return await outbox.log()


async def test_drains_at_once_neither_repeat_nor_disorder(outbox: Outbox) -> None:
    log = await race(outbox)
    assert disorder(log) == 0
    assert events_of(log) == list(range(300))


async def sending(outbox: Outbox) -> tuple[asyncio.Task[int], Any]:
    """A drain that has read what waits, and its producer, which sends once its gate is open."""
    drain, producer = outbox.drain()
    producer.gate.clear()
    task = asyncio.create_task(drain.drain())
    await producer.waits.wait()
    return task, producer


async def test_without_the_row_lock_drains_repeat_each_other(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sa.Select, "with_for_update", lambda self, **_: self)
    await outbox.add(0, 30)
    first, producer = await sending(outbox)
    drain, _ = outbox.drain()
    assert await drain.drain() == 30  # nothing keeps it away
    producer.gate.set()
    assert await first == 30
    log = await outbox.log()
    assert disorder(log) > 0
    assert len(events_of(log)) == 60


async def test_a_drain_that_lost_its_lock_only_repeats(outbox: Outbox) -> None:
    await outbox.add(0, 30)
    zombie, producer = await sending(outbox)
    drain, _ = outbox.drain()
    assert await drain.drain() == 0  # the lock is held
    async with outbox.engine.connect() as connection:
        await connection.execute(
            sa.text(
                "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity"
                " WHERE datname = current_database() AND state = 'idle in transaction'"
                " AND pid <> pg_backend_pid()"
            )
        )
    assert await drain.drain() == 30
    await outbox.add(30, 10)
    assert await drain.drain() == 10
    producer.gate.set()
    with pytest.raises(Retryable, match="database is away"):
        await zombie
    assert len(events_of(await outbox.log())) == 70
    believed = await outbox.believed()
    assert events_of(believed) == list(range(40))
    assert disorder(believed) == 0
    async with outbox.engine.connect() as connection:
        drained = (await connection.execute(sa.select(outbox_drains.c.drained))).scalar_one()
    assert drained == 40


async def test_an_outbox_without_events_takes_no_lock_and_no_number(outbox: Outbox) -> None:
    async with outbox.engine.begin() as transaction:
        await add_events(transaction, [])
    drain, _ = outbox.drain()
    assert await drain.drain() == 0
    await outbox.add(0, 1)
    assert await drain.drain() == 1
    assert rows_of(await outbox.log(), 0) == [1]


TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


async def traced_log(outbox: Outbox) -> dict[int, bytes | None]:
    """The trace context beside each record, by the number of its event."""
    reader = outbox.bus.reader({(outbox.topic.name, n): BEFORE_FIRST for n in range(PARTITIONS)})
    found: dict[int, bytes | None] = {}
    for _ in range(10):
        for raw in await reader.fetch(10_000, 0.3):
            numbers = (await outbox.decoder.decode(raw.values, outbox.topic.record)).frame
            contexts = raw.traceparents or [None] * len(raw)
            found |= dict(zip(numbers["version"].to_list(), contexts, strict=True))
    await reader.close()
    return found


@pytest.mark.parametrize("exported", [True, False])
async def test_a_rows_trace_goes_on_with_its_record(outbox: Outbox, *, exported: bool) -> None:
    """Rows of traced origins carry the unit's context through the table to the log; others none."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracer = provider.get_tracer("test") if exported else None
    topic, partition = ORIGIN
    at = np.arange(6, dtype=np.int64)
    context = f"00-{TRACE}-00f067aa0ba902b7-01".encode()
    contexts = [context if n in {1, 4} else None for n in range(6)]
    raw = RawBatch(topic, partition, at, [None] * 6, [b""] * 6, at, contexts)
    batch = Batch(topic, partition, pl.DataFrame({"n": at}), at, raw)
    with UnitSpans(tracer, "kafka", "g", hold=False).unit([batch]):
        await outbox.add(0, 6)
    await outbox.add(6, 2)  # no unit is in progress
    drain, producer = outbox.drain(OutboxSpans(tracer, "kafka"))
    producer.crashes = 1
    with pytest.raises(Retryable):
        await drain.drain()
    assert await drain.drain() == 8
    found = await traced_log(outbox)
    assert set(found) == set(range(8))
    traced = {number: one for number, one in found.items() if one is not None}
    assert set(traced) == {1, 4}
    if not exported:
        assert set(traced.values()) == {context}
        return
    spans = exporter.get_finished_spans()
    consumers = {span.context.span_id for span in spans if span.name == f"process {topic}"}
    sent = {span.context.span_id: span for span in spans if span.kind is SpanKind.PRODUCER}
    # Two rows, sent twice: a crash makes a second span, and the second send is what is on the log.
    assert len(sent) == 4
    assert {span.parent.span_id for span in sent.values() if span.parent} == consumers
    for one in traced.values():
        _, trace_id, span_id, flags = one.decode().split("-")
        assert (trace_id, flags) == (TRACE, "01")
        assert sent[int(span_id, 16)].name == f"send {outbox.topic.name}"
