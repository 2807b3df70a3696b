"""The runner on real Kafka and real Postgres: nothing lost, nothing twice, whoever is killed."""

from __future__ import annotations

import asyncio
import gc
import uuid
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import polars as pl
import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine

from causemesh.bus.base import Membership, Outbound, Producer
from causemesh.bus.kafka import KafkaBus
from causemesh.catalogue import WATERMARK, Catalogue, Topic
from causemesh.clock import SystemClock
from causemesh.codec.decode import Decoder
from causemesh.codec.encode import RegistryEncoders
from causemesh.codec.registry import HttpRegistry
from causemesh.errors import Fenced
from causemesh.positions import Checkpoint
from causemesh.positions_sql import SqlPositionStore
from causemesh.runner import (
    Batch,
    Emission,
    Emitter,
    Limits,
    Outgoing,
    PartitionWorker,
    Runner,
    Stage,
)

pytestmark = pytest.mark.servers
COUNT = 400
EFFECTS = sa.text("CREATE TABLE effects (event_id text, cause_position bigint)")
INSERT = sa.text("INSERT INTO effects VALUES (:event_id, :position)")


class Mesh:
    """inbox -> facts, on fresh topics."""

    def __init__(self, kafka: str, registry_url: str, database: AsyncEngine) -> None:
        name = uuid.uuid4().hex
        core = Catalogue.load()
        rejects = core.topic("ingest.rejects.v1")
        requests = core.topic("inbox.requests")
        self.inbox = self._renamed(requests, f"inbox.t{name}", (f"inbox.t{name}",))
        self.facts = self._renamed(
            core.topic("inference.requests.v1"), f"facts.t{name}", (self.inbox.name,)
        )
        topics = {t.name: t for t in (self.inbox, self.facts, rejects)}
        self.catalogue = Catalogue(topics, {}, {WATERMARK: core.controls[WATERMARK]})
        self.bus = KafkaBus(kafka)
        self.registry = HttpRegistry(registry_url)
        self.database = database
        self.store = SqlPositionStore(database)
        self.door = Stage("door", f"door-{name}", (self.inbox.name,), (self.facts.name,))
        self.sink = Stage("sink", f"sink-{name}", (self.facts.name,))
        self._producers: list[Producer] = []
        self._idle: dict[Runner, Membership] = {}
        self._running: list[tuple[Runner, asyncio.Task[None]]] = []

    @staticmethod
    def _renamed(topic: Topic, name: str, sources: tuple[str, ...]) -> Topic:
        everyone = ("door", "sink", "external")
        return Topic(
            name, topic.form, topic.record, topic.key, "door", everyone, everyone, sources, 4, 1,
            "NONE", "",
        )  # fmt: skip

    async def create(self) -> None:
        admin = self.bus.admin()
        await admin.ensure([self.inbox, self.facts])
        await admin.close()
        async with self.database.begin() as connection:
            await connection.execute(EFFECTS)

    def worker(
        self, stage: Stage, processor: Any, partition: int, producer: Producer
    ) -> PartitionWorker:
        emitter = Emitter(self.catalogue, RegistryEncoders(self.registry), producer, stage.writes)
        return PartitionWorker(
            stage,
            partition,
            processor,
            bus=self.bus,
            store=self.store,
            catalogue=self.catalogue,
            decoder=Decoder(self.registry),
            emitter=emitter,
            clock=SystemClock(),
            limits=Limits(max_records=25),
        )

    def runner(self, stage: Stage, processor: Any) -> Runner:
        producer = self.bus.producer(stage.group)
        self._producers.append(producer)
        membership = self.bus.membership(stage.group, stage.shared)
        made = Runner(
            membership, lambda n: self.worker(stage, processor(), n, producer), SystemClock()
        )
        self._idle[made] = membership
        return made

    def start(self, runner: Runner) -> asyncio.Task[None]:
        """Run it; `close` ends it where the test did not."""
        del self._idle[runner]
        task = asyncio.create_task(runner.run())
        self._running.append((runner, task))
        return task

    async def close(self) -> None:
        """Leave nothing open, also of a test that failed: the next one would be told of it."""
        try:
            for runner, _ in self._running:
                runner.stop()
            async with asyncio.timeout(30):
                await asyncio.gather(*(task for _, task in self._running if not task.done()))
        finally:
            for membership in self._idle.values():  # of runners that the test did not come to
                await membership.close()
            for producer in self._producers:
                await producer.close()
            await self.registry.close()
            gc.collect()  # what a crash abandoned: here its test says that it is expected

    async def produce(self, count: int, *, offset: int = 0) -> None:
        """Requests from outside, in the external form."""
        encoder = await RegistryEncoders(self.registry).encoder(
            self.inbox.subject, self.inbox.record
        )
        frame = pl.DataFrame(
            {
                "event_id": [f"r{offset + n}" for n in range(count)],
                "tenant_id": ["t"] * count,
                "occurred_at": pl.Series(range(count)).cast(pl.Datetime("us", "UTC")),
                "model": ["m"] * count,
                "version": pl.Series([None] * count, dtype=pl.Int32),
                "entities": [[{"name": "tail", "value": f"N{n % 37}"}] for n in range(count)],
                "inputs": [[{"name": "hour", "value": float(n)}] for n in range(count)],
                "mode": ["live"] * count,
                "expires_at": pl.Series([None] * count, dtype=pl.Datetime("us", "UTC")),
            }
        )
        values = encoder.encode(frame)
        keys = [b"N%d" % (n % 37) for n in range(count)]
        producer = self.bus.producer("outside")
        await producer.send(
            [Outbound(self.inbox.name, n % 4, [keys[n]], [values[n]]) for n in range(count)]
        )
        await producer.close()

    async def effects(self) -> list[str]:
        async with self.database.connect() as connection:
            rows = await connection.execute(sa.text("SELECT event_id FROM effects"))
            return sorted(row[0] for row in rows)


class Plain:
    takes_bad_rows = False
    stateful = False

    def snapshot(self) -> bytes | None:
        return None

    def restore(self, state: bytes | None) -> None:
        """No state."""


def door_to(target: str) -> type[Plain]:
    class Door(Plain):
        async def process(self, batches: Sequence[Batch], watermark_us: int, tx: Any) -> Emission:
            return Emission([self._pass(batch) for batch in batches])

        @staticmethod
        def _pass(batch: Batch) -> Outgoing:
            keys = [batch.raw.keys[row] for row in batch.rows.tolist()]
            at = (batch.topic, batch.partition, batch.positions)
            return Outgoing(target, batch.frame, keys, *at)

    return Door


class Sink(Plain):
    async def process(self, batches: Sequence[Batch], watermark_us: int, tx: Any) -> Emission:
        for batch in batches:
            ids = batch.frame["event_id"].to_list()
            positions = batch.frame["cause"].struct.field("position").to_list()
            rows = [{"event_id": i, "position": p} for i, p in zip(ids, positions, strict=True)]
            await tx.execute(INSERT, rows)
        return Emission()


@pytest.fixture
async def mesh(kafka_bootstrap: str, registry_url: str, database: AsyncEngine) -> Any:
    made = Mesh(kafka_bootstrap, registry_url, database)
    try:
        await made.create()
        yield made
    finally:
        await made.close()


async def until(mesh: Mesh, count: int, timeout_s: float = 60) -> list[str]:
    async with asyncio.timeout(timeout_s):
        while len(found := await mesh.effects()) < count:  # noqa: ASYNC110 - polls a database
            await asyncio.sleep(0.1)
    return found


def shared(one: Runner, other: Runner) -> bool:
    """Whether both own partitions, and together all of them."""
    owned = sorted([*one.workers, *other.workers])
    return bool(one.workers) and bool(other.workers) and owned == [0, 1, 2, 3]


async def crash(task: asyncio.Task[None]) -> None:
    """Cancel at whatever await it is in: nothing after that point happens."""
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


# A crash leaves connections open in whatever state they are.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_crashes_lose_and_double_nothing(mesh: Mesh) -> None:
    await mesh.produce(COUNT)
    expected = sorted(f"r{n}" for n in range(COUNT))
    for pause in (0.6, 0.9, 1.3):
        runners = [mesh.runner(mesh.sink, Sink), mesh.runner(mesh.door, door_to(mesh.facts.name))]
        tasks = [mesh.start(runner) for runner in runners]
        await asyncio.sleep(pause)
        for task in tasks:
            await crash(task)
    last = [mesh.runner(mesh.sink, Sink), mesh.runner(mesh.door, door_to(mesh.facts.name))]
    tasks = [mesh.start(runner) for runner in last]
    assert await until(mesh, COUNT) == expected
    for runner in last:
        runner.stop()
    await asyncio.gather(*tasks)
    assert await mesh.effects() == expected


async def test_members_that_come_and_go_lose_and_double_nothing(mesh: Mesh) -> None:
    """A second member takes half of the partitions, the first leaves, a third comes."""
    door = mesh.runner(mesh.door, door_to(mesh.facts.name))
    first, second, third = (mesh.runner(mesh.sink, Sink) for _ in range(3))
    tasks = [mesh.start(runner) for runner in (door, first)]
    await mesh.produce(COUNT)
    await until(mesh, COUNT // 4)
    tasks.append(mesh.start(second))
    async with asyncio.timeout(90):
        while not shared(first, second):  # noqa: ASYNC110 - polls a group
            await asyncio.sleep(0.1)
    await mesh.produce(COUNT, offset=COUNT)
    first.stop()
    await asyncio.sleep(0.2)
    tasks.append(mesh.start(third))
    expected = sorted(f"r{n}" for n in range(2 * COUNT))
    assert await until(mesh, 2 * COUNT) == expected
    for runner in (door, second, third):
        runner.stop()
    await asyncio.gather(*tasks)
    assert await mesh.effects() == expected


async def test_a_replaced_worker_cannot_commit(mesh: Mesh) -> None:
    old, _ = await mesh.store.claim("g", 0)
    new, checkpoint = await mesh.store.claim("g", 0)
    assert checkpoint is None
    async with mesh.store.unit(old) as unit:
        await unit.transaction.execute(INSERT, [{"event_id": "zombie", "position": 1}])
        with pytest.raises(Fenced):
            await unit.commit(Checkpoint({("t", 0): 1}))
    async with mesh.store.unit(new) as unit:
        await unit.transaction.execute(INSERT, [{"event_id": "owner", "position": 1}])
        await unit.commit(Checkpoint({("t", 0): 7}, [["t", 0, "c", 1, 5, 0]], [], 11, b"state"))
    _, stored = await mesh.store.claim("g", 0)
    assert stored == Checkpoint({("t", 0): 7}, [["t", 0, "c", 1, 5, 0]], [], 11, b"state")
    assert await mesh.effects() == ["owner"]
    assert await mesh.store.watermark("g", 1) == 11
    assert await mesh.store.watermark("g", 2) is None
