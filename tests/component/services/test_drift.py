"""Drift on real servers: nothing lost or doubled by kill -9, and the same log, the same findings.

The process runs on topics and a group of its own: run as a script, this file serves drift through
`PrivateBus`, which gives every topic another name at the broker.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import polars as pl
import pytest
import sqlalchemy as sa
from prometheus_client import CollectorRegistry, Counter
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from causemesh.bus.base import Outbound, RawBatch, TopicPartition
from causemesh.bus.kafka import KafkaAdmin, KafkaBus, KafkaMembership, KafkaProducer, KafkaReader
from causemesh.catalogue import Catalogue, Topic
from causemesh.clock import SystemClock
from causemesh.codec.decode import Decoder
from causemesh.codec.encode import RegistryEncoders
from causemesh.codec.registry import HttpRegistry, MemoryRegistry
from causemesh.errors import Poison, Retryable
from causemesh.local import Endpoints
from causemesh.log import LogReader
from causemesh.migrations import migrate
from causemesh.outbox import records_frame
from causemesh.positions_sql import SqlPositionStore
from causemesh.runner import Batch, Emitter, Outgoing
from causemesh.service import Service, run_process
from causemesh.telemetry import configure_logging
from services.drift import app, store
from services.drift.closing import DayCloser
from services.drift.domain.days import day_end_us, labels_until_us
from services.drift.domain.detectors import judge, parse_drift
from services.drift.domain.histograms import Signature, count_batch, reference_histogram
from services.drift.domain.reports import daily_reports
from services.drift.handlers import PREDICTIONS, Monitor, stage_of
from services.drift.settings import DriftSettings
from services.drift.versions import VERSIONS, Versions

pytestmark = pytest.mark.servers
ROOT = Path(__file__).parents[3]
PROJECT = ROOT / "tests" / "project"
TOKEN = "a-token-for-the-drift-test"
TASKS = "inference.tasks.realtime.v1"
OUTAGES = "events.outage"
FINDINGS = ("drift.reports.v1", "drift.alerts.v1", "training.requests.v1")
DAYS = ("2013-03-01", "2013-03-02", "2013-03-03")
COUNT = 400
DAY_US = 86_400_000_000
CONFIG = parse_drift(
    {
        "label_wait_hours": 24,
        "minimum_records": 100,
        "alerts": {"psi": {"above": 0.25}, "auc": {"below": 0.65}},
        "retrain_after_alert_days": 1,
    }
)


class PrivateReader:
    def __init__(self, reader: KafkaReader, suffix: str) -> None:
        self._reader = reader
        self._suffix = suffix
        self.close = reader.close

    async def fetch(self, max_records: int, max_wait_s: float) -> list[RawBatch]:
        raws = await self._reader.fetch(max_records, max_wait_s)
        return [self._renamed(raw) for raw in raws]

    def _renamed(self, raw: RawBatch) -> RawBatch:
        return RawBatch(
            raw.topic.removesuffix(self._suffix),
            raw.partition,
            raw.positions,
            raw.keys,
            raw.values,
            raw.appended_at_us,
            raw.traceparents,
        )


class PrivateProducer:
    def __init__(self, producer: KafkaProducer, suffix: str) -> None:
        self._producer = producer
        self._suffix = suffix
        self.close = producer.close

    async def send(self, outbound: Sequence[Outbound]) -> None:
        await self._producer.send([replace(o, topic=o.topic + self._suffix) for o in outbound])


class PrivateMembership:
    def __init__(self, membership: KafkaMembership, suffix: str) -> None:
        self._membership = membership
        self._suffix = suffix
        self.changed = membership.changed
        self.close = membership.close

    async def report(self, positions: Mapping[TopicPartition, int]) -> None:
        await self._membership.report(
            {(t + self._suffix, n): at for (t, n), at in positions.items()}
        )


class PrivateAdmin:
    def __init__(self, admin: KafkaAdmin, suffix: str) -> None:
        self._admin = admin
        self._suffix = suffix
        self.reported = admin.reported
        self.close = admin.close

    async def ensure(self, topics: Sequence[Topic]) -> list[str]:
        return await self._admin.ensure([replace(t, name=t.name + self._suffix) for t in topics])

    async def ends(self, topics: Sequence[str]) -> dict[TopicPartition, int]:
        ends = await self._admin.ends([name + self._suffix for name in topics])
        return {(t.removesuffix(self._suffix), n): at for (t, n), at in ends.items()}


class PrivateBus:
    """Kafka with topics and groups that nobody else uses."""

    def __init__(self, bootstrap: str, suffix: str, group: str) -> None:
        self._bus = KafkaBus(bootstrap)
        self._suffix = suffix
        self._group = group
        self.close = self._bus.close

    def reader(self, after: Mapping[TopicPartition, int]) -> PrivateReader:
        named = {(topic + self._suffix, n): at for (topic, n), at in after.items()}
        return PrivateReader(self._bus.reader(named), self._suffix)

    def producer(self, name: str) -> PrivateProducer:
        return PrivateProducer(self._bus.producer(name), self._suffix)

    def membership(self, group: str, topics: Sequence[str]) -> PrivateMembership:
        named = [topic + self._suffix for topic in topics]
        return PrivateMembership(self._bus.membership(group + self._group, named), self._suffix)

    def admin(self) -> PrivateAdmin:
        return PrivateAdmin(self._bus.admin(), self._suffix)


async def serve_privately(suffix: str, database: str) -> None:
    """The service's process, as `services.drift.app` runs it."""
    settings = DriftSettings()
    configure_logging("drift")
    engine = create_async_engine(f"{settings.postgres_url}/{database}")
    await migrate("drift", engine)
    service = Service(
        "drift",
        settings,
        catalogue=Catalogue.load([PROJECT]),
        bus=PrivateBus(settings.kafka_bootstrap, suffix, database),
        registry=HttpRegistry(settings.registry_url),
        engine=engine,
    )
    try:
        await app.serve(service, settings)
    finally:
        await service.close()


@dataclass
class Process:
    """A drift process with a database of its own."""

    cluster: Endpoints
    suffix: str
    database: str
    log: Path
    port: int = 0
    child: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        environment = {
            **os.environ,
            **self.cluster.environment(),
            "CAUSEMESH_API_TOKEN": TOKEN,
            "CAUSEMESH_API_PORT": str(self.port),
            "CAUSEMESH_PROJECT": str(PROJECT),
            "CAUSEMESH_CLOSE_EVERY_S": "0.2",
            "POLARS_MAX_THREADS": "1",
        }
        command = [sys.executable, __file__, self.suffix, self.database]
        with self.log.open("ab") as log:
            self.child = subprocess.Popen(
                command, env=environment, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT
            )

    def end(self, number: signal.Signals) -> int:
        assert self.child is not None
        self.child.send_signal(number)
        return self.child.wait(60)

    def client(self, token: str = TOKEN) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{self.port}/v1",
            headers={"Authorization": f"Bearer {token}"},
        )

    @asynccontextmanager
    async def engine(self) -> AsyncIterator[AsyncEngine]:
        engine = create_async_engine(self.cluster.database(self.database))
        yield engine
        await engine.dispose()


@asynccontextmanager
async def process(cluster: Endpoints, suffix: str, folder: Path) -> AsyncIterator[Process]:
    """Started with a fresh database; killed if need be and the database dropped at the end."""
    name = f"drift_{uuid.uuid4().hex[:12]}"
    server = create_async_engine(cluster.database("postgres"), isolation_level="AUTOCOMMIT")
    async with server.connect() as connection:
        await connection.execute(sa.text(f"CREATE DATABASE {name}"))
    made = Process(cluster, suffix, name, folder / f"{name}.log")
    made.start()
    try:
        yield made
    except BaseException:
        print(made.log.read_text()[-4000:])
        raise
    finally:
        if made.child is not None and made.child.poll() is None:
            made.end(signal.SIGKILL)
        async with server.connect() as connection:
            await connection.execute(sa.text(f"DROP DATABASE {name} WITH (FORCE)"))
        await server.dispose()


class Upstream:
    """What inference and ingest would send."""

    def __init__(self, bus: PrivateBus, catalogue: Catalogue, registry: HttpRegistry) -> None:
        self.catalogue = catalogue
        self._producer = bus.producer("upstream")
        writes = (PREDICTIONS, VERSIONS, OUTAGES)
        self._emitter = Emitter(catalogue, RegistryEncoders(registry), self._producer, writes)
        self._sent = 0
        self.close = self._producer.close

    async def send(self, topic: str, frame: pl.DataFrame, key: str, cause: str) -> None:
        positions = np.arange(self._sent, self._sent + frame.height)
        self._sent += frame.height
        keys = [text.encode() for text in frame[key]]
        if topic == OUTAGES:
            ids = pl.Series("event_id", [f"o{n}" for n in positions])
            frame = frame.with_columns(ids)
        await self._emitter.send([Outgoing(topic, frame, keys, cause, 0, positions)], {})

    async def register(self, record: Mapping[str, Any]) -> None:
        schema = self.catalogue.topic(VERSIONS).record
        frame = records_frame(schema, [record])
        await self.send(VERSIONS, frame, "model", "outbox.inference")

    async def predict(self, frame: pl.DataFrame) -> None:
        await self.send(PREDICTIONS, frame, "request_id", TASKS)

    async def outages(self, frame: pl.DataFrame) -> None:
        """Keyed by their own request, so a request's labels stay in order on one partition."""
        await self.send(OUTAGES, frame, "reading_id", "inbox.outage")

    async def promise(self, at_us: int) -> None:
        pairs = [(PREDICTIONS, TASKS)]
        pairs += [(kind.events, kind.inbox) for kind in self.catalogue.event_types.values()]
        await self._emitter.send(
            [], {(topic, source, n): at_us for topic, source in pairs for n in range(4)}
        )


def instants(us: Sequence[int] | np.ndarray[Any, Any]) -> pl.Series:
    return pl.Series(np.asarray(us, np.int64)).cast(pl.Datetime("us", "UTC"))


def predictions(
    model: str, day: str, x: np.ndarray[Any, Any], version: int = 1, tenant: str = "t"
) -> pl.DataFrame:
    """One prediction for each x in 0..1, spread over the day; the score is x squeezed a little."""
    count = len(x)
    start = day_end_us(day) - DAY_US
    return pl.DataFrame(
        {
            "tenant_id": [tenant] * count,
            "occurred_at": instants(start + np.arange(count) * (DAY_US // count)),
            "request_id": [f"{model}-{day}-{n}" for n in range(count)],
            "model": [model] * count,
            "version": pl.Series([version] * count, dtype=pl.Int32),
            "outcome": ["predicted"] * count,
            "score": 0.1 + 0.8 * x,
            "reason": pl.Series([None] * count, dtype=pl.String),
            "vector": [np.array([v, 7.0], "<f4").tobytes() for v in x],
            "lane": ["realtime"] * count,
            "compute_ms": [1.0] * count,
            "predicted_at": instants(np.full(count, 1)),
        }
    )


def outages(
    requests: Sequence[str], failed: Sequence[bool], at_us: int, tenant: str = "t"
) -> pl.DataFrame:
    count = len(requests)
    return pl.DataFrame(
        {
            "tenant_id": [tenant] * count,
            "occurred_at": instants(at_us + np.arange(count)),
            "reading_id": list(requests),
            "failed": list(failed),
        }
    )


def registration(model: str, version: int = 1, **changes: Any) -> dict[str, Any]:
    x = np.random.default_rng(0).random(2_000)
    columns = {"x": reference_histogram(x), "score": reference_histogram(0.1 + 0.8 * x)}
    return {
        "tenant_id": "-",
        "occurred_at": 0,
        "model": model,
        "version": version,
        "lane": "realtime",
        "features": ["x", "y"],
        "required": [],
        "artefact_sha256": "0",
        "label": {"event_type": "outage", "request_id": "reading_id", "positive": "failed"},
        "reference": [
            {"column": name, "edges": h.edges.tolist(), "counts": h.counts.tolist()}
            for name, h in columns.items()
        ],
        "metrics": [],
        "sequence": 1,
    } | changes


async def until(what: Callable[[], Any], seconds: float = 90) -> Any:
    """Ask until the answer is not false."""
    ends = time.monotonic() + seconds
    while not (found := await what()):
        assert time.monotonic() < ends, "it did not happen"
        await asyncio.sleep(0.1)
    return found


async def rows(engine: AsyncEngine, statement: str) -> list[tuple[Any, ...]]:
    try:
        async with engine.connect() as connection:
            return [tuple(row) for row in await connection.execute(sa.text(statement))]
    except sa.exc.ProgrammingError:  # before the first migration
        return []


async def number(engine: AsyncEngine, table: str) -> int:
    found = await rows(engine, f"SELECT count(*) FROM {table}")
    return int(found[0][0]) if found else 0


RESULTS = (
    "SELECT * FROM reports ORDER BY day, model, version, number",
    "SELECT * FROM alerts ORDER BY day, model, version, number",
    "SELECT * FROM closed_days ORDER BY day, model, version",
    "SELECT * FROM day_spans ORDER BY day, model, version, partition",
    "SELECT * FROM histograms ORDER BY 1, 2, 3, 4, 5, 6",
    "SELECT * FROM scored ORDER BY 1, 2",
    "SELECT * FROM labels ORDER BY 1, 2, 3",
)


def expected(model: str, frames: Mapping[str, pl.DataFrame], labels: pl.DataFrame) -> list[Any]:
    """Reports from the pure domain over everything at once."""
    signature = Signature.from_record(registration(model))
    found = []
    for day, frame in frames.items():
        until_us = labels_until_us(day, CONFIG.label_wait_hours)
        fitting = labels.filter(pl.col("occurred_at").to_physical() < until_us)
        first = fitting.sort("occurred_at").unique("reading_id", keep="first")
        joined = frame.join(first, left_on="request_id", right_on="reading_id", how="left")
        scored = joined.select("score", pl.col("failed").alias("positive"))
        found += daily_reports(day, count_batch(frame, signature), scored, signature.reference)
    return found


async def all_pages(client: httpx.AsyncClient, path: str, **query: Any) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = []
    cursor: dict[str, str] = {}
    while True:
        answer = await client.get(path, params={"limit": 2, **query, **cursor})
        assert answer.status_code == 200, answer.text
        page = answer.json()
        items += page["items"]
        if page["next_cursor"] is None:
            return items
        cursor = {"cursor": page["next_cursor"]}


async def test_a_killed_process_and_a_second_reading_find_the_same(
    cluster: Endpoints, tmp_path: Path
) -> None:
    catalogue = Catalogue.load([PROJECT])
    suffix = f".x{uuid.uuid4().hex[:8]}"
    bus = PrivateBus(cluster.kafka_bootstrap, suffix, "")
    registry = HttpRegistry(cluster.registry_url)
    admin = bus.admin()
    touched = [*stage_of(catalogue).shared, VERSIONS, *FINDINGS]
    await admin.ensure([catalogue.topic(name) for name in touched])
    await admin.close()
    upstream = Upstream(bus, catalogue, registry)
    rng = np.random.default_rng(7)
    model = "m"
    xs = {DAYS[0]: rng.random(COUNT), DAYS[1]: rng.random(COUNT) ** 4, DAYS[2]: rng.random(50)}
    frames = {day: predictions(model, day, x) for day, x in xs.items()}
    good = outages(
        frames[DAYS[0]]["request_id"].to_list()[:300],
        (xs[DAYS[0]] + rng.normal(0, 0.2, COUNT) > 0.5).tolist()[:300],
        day_end_us(DAYS[0]),
    )
    bad = outages(
        frames[DAYS[1]]["request_id"].to_list(),
        (rng.random(COUNT) > 0.5).tolist(),
        day_end_us(DAYS[1]),
    )
    too_late = outages(
        frames[DAYS[0]]["request_id"].to_list()[300:],
        [True] * 100,
        labels_until_us(DAYS[0], 24),
    )
    nobodys = outages(["never-asked"], [True], day_end_us(DAYS[0]))
    labels = pl.concat([good, bad, too_late, nobodys])
    truth = expected(model, {day: frames[day] for day in DAYS[:2]}, labels)
    without_bound = expected(
        model,
        {day: frames[day] for day in DAYS[:2]},
        pl.concat([good, bad, too_late.with_columns(instants([0] * 100).alias("occurred_at"))]),
    )
    assert truth != without_bound  # so a label that came too late would be seen below

    async with process(cluster, suffix, tmp_path) as first, first.engine() as engine:
        # A prediction may come before its version; it waits.
        await upstream.predict(frames[DAYS[0]][:100])
        await until(lambda: number(engine, "checkpoints"))
        await asyncio.sleep(1.0)
        assert await number(engine, "scored") == 0
        await upstream.outages(good[:150])
        await upstream.register(registration(model))
        await until(lambda: number(engine, "scored"))

        for start in range(100, COUNT, 60):
            await upstream.predict(frames[DAYS[0]][start : start + 60])
        await upstream.outages(pl.concat([good[150:], nobodys]))
        first.end(signal.SIGKILL)
        await upstream.predict(frames[DAYS[1]])
        first.start()
        await upstream.outages(pl.concat([too_late, bad]))
        await upstream.predict(frames[DAYS[2]])
        await upstream.promise(labels_until_us(DAYS[1], 24) + 1)
        await until(lambda: number(engine, "closed_days"))
        await until(lambda: all_sent(engine))
        kept = [await rows(engine, statement) for statement in RESULTS]
        assert await rows(engine, "SELECT sum(records) FROM day_spans") == [(2 * COUNT + 50,)]
        assert await rows(engine, "SELECT sum(count) FROM histograms") == [(2 * (2 * COUNT + 50),)]
        await check_api(first, model, truth)
        assert first.end(signal.SIGTERM) == 0

    log = LogReader(bus, catalogue, Decoder(registry))
    told = await read_findings(log)
    await check_events(log, told, truth)

    # The same log with an empty database: the same rows, and the same events once more.
    async with process(cluster, suffix, tmp_path) as second, second.engine() as engine:
        await until(lambda: number(engine, "closed_days"))
        await until(lambda: all_sent(engine))
        assert [await rows(engine, statement) for statement in RESULTS] == kept
        assert second.end(signal.SIGTERM) == 0
    assert await read_findings(log) == told
    await upstream.close()
    await registry.close()


async def all_sent(engine: AsyncEngine) -> bool:
    """Both days are closed and their events are out."""
    return await number(engine, "closed_days") == 2 and await number(engine, "outbox_rows") == 0


async def check_api(served: Process, model: str, truth: Sequence[Any]) -> None:
    async with served.client("another-token-than-ours") as stranger:
        assert (await stranger.get("/reports")).status_code == 401
    async with served.client() as client:
        key = {"model": model, "version": 1}
        found = await all_pages(client, "/reports", model=model)
        assert found == [key | vars(report) for report in reversed(truth)]
        alerts = judge(truth, CONFIG)
        assert {alert.day for alert in alerts} == {DAYS[1]}
        assert {alert.detector for alert in alerts} == {"psi", "auc"}
        found = await all_pages(client, "/alerts", day=DAYS[1])
        assert found == [key | vars(alert) for alert in reversed(alerts)]
        assert await all_pages(client, "/alerts", day=DAYS[0]) == []
        [known] = await all_pages(client, "/models")
        assert (known["model"], known["last_closed_day"]) == (model, DAYS[1])
        assert (known["references"], known["problem"]) == (["score", "x"], None)
        wrong = await client.get("/models", params={"cursor": "WzFd"})
        assert (wrong.status_code, wrong.json()["title"]) == (422, "invalid cursor")


async def read_findings(log: LogReader) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in FINDINGS}
    async for batch in log.read(await log.ends(FINDINGS)):
        found[batch.topic] += batch.frame.to_dicts()
    return found


async def check_events(
    log: LogReader, told: Mapping[str, list[dict[str, Any]]], truth: Sequence[Any]
) -> None:
    reports, alerts, retraining = (told[name] for name in FINDINGS)
    names = ("day", "detector", "column", "value", "records")
    assert [tuple(row[name] for name in names) for row in reports] == [
        tuple(vars(report).values()) for report in truth
    ]
    assert {row["detector"] for row in alerts} == {"psi", "auc"}
    [asked] = retraining
    assert asked["reason"].startswith(f"auc alerted on {DAYS[1]}")
    for row in (*reports, *alerts, *retraining):
        assert row["tenant_id"] == "-"
        assert row["cause"]["topic"] == "outbox.drift"
        origin = row["cause"]["origin"]
        assert origin["topic"] == PREDICTIONS
        day_before = row["occurred_at"].timestamp() * 1e6 - DAY_US
        cause = await log.one(PREDICTIONS, origin["partition"], origin["position"])
        assert cause is not None
        assert 0 <= cause.occurred_at_us[0] - day_before < DAY_US


class HesitantBus(PrivateBus):
    """Which does not know the topic's partitions when it is first asked, as of one quite new."""

    asked = 0

    def admin(self) -> PrivateAdmin:
        admin = super().admin()
        self.asked += 1
        if self.asked == 1:
            admin.ends = self._unknown
        return admin

    async def _unknown(self, topics: Sequence[str]) -> dict[TopicPartition, int]:
        raise Retryable(f"Kafka does not know {topics[0]} (yet)")


async def test_versions_are_followed_on_a_topic_that_is_only_being_made(cluster: Endpoints) -> None:
    catalogue = Catalogue.load([PROJECT])
    bus = HesitantBus(cluster.kafka_bootstrap, f".x{uuid.uuid4().hex[:8]}", "")
    registry = HttpRegistry(cluster.registry_url)
    followed = Versions(bus, catalogue, Decoder(registry), outcomes())
    following = asyncio.create_task(followed.run())
    upstream = Upstream(bus, catalogue, registry)

    async def complete() -> bool:
        assert not following.done()
        return followed.complete

    async def known() -> list[int]:
        return [one.sequence for one in followed.all()]

    await until(complete)
    assert await known() == []
    await upstream.register(registration("m", sequence=1))
    assert await until(known) == [1]
    following.cancel()
    with pytest.raises(asyncio.CancelledError):
        await following
    again = Versions(bus, catalogue, Decoder(registry), outcomes())
    following = asyncio.create_task(again.run())
    await until(lambda: asyncio.sleep(0, again.complete))
    assert [one.sequence for one in again.all()] == [1]  # read before it was complete
    following.cancel()
    with pytest.raises(asyncio.CancelledError):
        await following
    await upstream.close()
    await registry.close()


# The same classes on a database, without a broker.


class HandClock(SystemClock):
    now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s


def outcomes() -> Counter:
    return Counter("outcomes", "", ("kind", "outcome"), registry=CollectorRegistry())


@pytest.fixture
def versions() -> Versions:
    catalogue = Catalogue.load([PROJECT])
    nowhere = KafkaBus("127.0.0.1:1")
    made = Versions(nowhere, catalogue, Decoder(MemoryRegistry()), outcomes())
    made.complete = True
    return made


@pytest.fixture
async def tables(database: AsyncEngine) -> AsyncEngine:
    async with database.begin() as connection:
        await connection.run_sync(store.metadata.create_all)
    return database


def batch(topic: str, frame: pl.DataFrame, partition: int = 0, start: int = 0) -> Batch:
    count = frame.height
    positions = np.arange(start, start + count)
    raw = RawBatch(topic, partition, positions, [None] * count, [b""] * count, positions)
    return Batch(topic, partition, frame, np.arange(count), raw)


def monitor(versions: Versions, clock: SystemClock | None = None) -> Monitor:
    clock = clock or SystemClock()
    return Monitor(versions, clock=clock, version_wait_s=60, outcomes=outcomes())


async def handle(engine: AsyncEngine, processor: Monitor, *batches: Batch) -> None:
    async with engine.begin() as transaction:
        await processor.process(batches, 0, transaction)


async def test_an_unknown_version_is_waited_for_but_not_for_ever(
    tables: AsyncEngine, versions: Versions
) -> None:
    clock = HandClock()
    processor = monitor(versions, clock)
    unit = batch(PREDICTIONS, predictions("m", DAYS[0], np.array([0.2, 0.4])))
    for clock.now_s in (100.0, 159.9):
        with pytest.raises(Retryable, match="'m' version 1 is not known yet"):
            await handle(tables, processor, unit)
    assert await number(tables, "scored") == 0
    clock.now_s = 160.0
    await handle(tables, processor, unit)
    assert (await number(tables, "scored"), await number(tables, "histograms")) == (2, 0)
    versions.learn(registration("m"))
    later = batch(PREDICTIONS, predictions("m", DAYS[1], np.array([0.2, 0.4])))
    await handle(tables, processor, later)
    assert (await number(tables, "scored"), await number(tables, "histograms")) == (4, 4)


async def test_nothing_is_handled_before_the_versions_are_read(
    tables: AsyncEngine, versions: Versions
) -> None:
    versions.complete = False
    with pytest.raises(Retryable, match="not read yet"):
        await handle(tables, monitor(versions), batch(OUTAGES, outages(["r"], [True], 1)))
    versions.complete = True
    await handle(tables, monitor(versions), batch(OUTAGES, outages(["r"], [True], 1)))


async def test_poison_names_its_batch_and_row(tables: AsyncEngine, versions: Versions) -> None:
    versions.learn(registration("m"))
    frame = predictions("m", DAYS[0], np.array([0.2, 0.4, 0.6]))
    cut = frame.with_columns(
        vector=pl.Series([frame["vector"][0], b"1234", frame["vector"][2]], dtype=pl.Binary)
    )
    events = batch(OUTAGES, outages(["r"], [True], 1))
    with pytest.raises(Poison) as poison:
        await handle(tables, monitor(versions), events, batch(PREDICTIONS, cut))
    assert (poison.value.batch, list(poison.value.rows)) == (1, [1])
    assert await number(tables, "labels") == 0
    await handle(tables, monitor(versions), events, batch(PREDICTIONS, frame))
    assert await number(tables, "scored") == 3


async def test_a_registration_that_cannot_be_used_stops_nobody(
    tables: AsyncEngine, versions: Versions
) -> None:
    reference = [{"column": "x", "edges": [1.0], "counts": [1]}]
    versions.learn(registration("broken", reference=reference))
    versions.learn(registration("good"))
    known = versions.get("broken", 1)
    assert known is not None
    assert "1 edges need 3 counts" in str(known.problem)
    both = [predictions(name, DAYS[0], np.array([0.2, 0.4])) for name in ("broken", "good")]
    await handle(tables, monitor(versions), batch(PREDICTIONS, pl.concat(both)))
    assert await rows(tables, "SELECT DISTINCT model FROM histograms") == [("good",)]
    assert await number(tables, "scored") == 4


def test_the_highest_sequence_of_a_version_wins(versions: Versions) -> None:
    versions.learn(registration("m", sequence=5, label=None))
    versions.learn(registration("m", sequence=4))
    assert not versions.rules("outage")
    versions.learn(registration("m", sequence=6))
    assert len(versions.rules("outage")) == 1
    versions.learn(registration("n"))
    assert len(versions.rules("outage")) == 1  # the same rule
    assert [(one.model, one.sequence) for one in versions.all()] == [("m", 6), ("n", 1)]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
@pytest.mark.parametrize("together", [True, False])
async def test_the_first_label_in_event_time_counts_in_any_order(
    tables: AsyncEngine, versions: Versions, order: Sequence[int], *, together: bool
) -> None:
    versions.learn(registration("m"))
    told = [outages(["r"], [False], 5), outages(["r"], [True], 6), outages(["r"], [True], 5)]
    if together:
        frame = pl.concat([told[place] for place in order])
        await handle(tables, monitor(versions), batch(OUTAGES, frame))
    else:
        for place in order:
            await handle(tables, monitor(versions), batch(OUTAGES, told[place]))
    assert await rows(tables, "SELECT occurred_us, positive FROM labels") == [(5, False)]


@pytest.mark.parametrize("partition", [0, 1])
async def test_workers_do_not_wait_for_each_other(
    tables: AsyncEngine, versions: Versions, partition: int
) -> None:
    """Partition 1 does not; the control, two units of partition 0, does."""
    versions.learn(registration("m"))
    frame = predictions("m", DAYS[0], np.array([0.2, 0.4]))
    other = frame.with_columns(pl.col("request_id") + "x")
    async with tables.connect() as open_unit, tables.connect() as second:
        await monitor(versions).process([batch(PREDICTIONS, frame)], 0, open_unit)
        await second.execute(sa.text("SET LOCAL lock_timeout = '300ms'"))
        work = monitor(versions).process([batch(PREDICTIONS, other, partition)], 0, second)
        if partition == 0:
            with pytest.raises(sa.exc.DBAPIError, match="lock timeout"):
                await work
        else:
            await work


class Days:
    """A closer over a database, and the group's watermark in it."""

    def __init__(self, engine: AsyncEngine, versions: Versions, keep_days: int = 30) -> None:
        self.engine = engine
        self.closer = DayCloser(
            engine,
            SqlPositionStore(engine),
            stage_of(Catalogue.load([PROJECT])),
            partitions=4,
            versions=versions,
            config=CONFIG,
            clock=SystemClock(),
            every_s=1,
            keep_days=keep_days,
            outcomes=outcomes(),
        )

    async def promise(self, at_us: int, partitions: int = 4) -> None:
        async with self.engine.begin() as connection:
            await connection.execute(sa.text("DELETE FROM checkpoints"))
            for n in range(partitions):
                await connection.execute(
                    sa.text(
                        "INSERT INTO checkpoints (group_name, partition, epoch, watermark_us)"
                        f" VALUES ('drift', {n}, 1, {at_us + n})"
                    )
                )


async def test_a_day_is_closed_once_and_never_changes(
    tables: AsyncEngine, versions: Versions
) -> None:
    versions.learn(registration("m"))
    x = np.random.default_rng(3).random(150)
    frame = predictions("m", DAYS[0], x)
    await handle(tables, monitor(versions), batch(PREDICTIONS, frame))
    days = Days(tables, versions)
    due_us = labels_until_us(DAYS[0], 24)
    assert await days.closer.close_due() == 0
    await days.promise(due_us, partitions=3)
    assert await days.closer.close_due() == 0
    await days.promise(due_us - 1)
    assert await days.closer.close_due() == 0
    await days.promise(due_us)
    async with tables.begin() as other:
        assert await store.Days.lock(other)
        assert await days.closer.close_due() == 0
        assert await number(tables, "closed_days") == 0
    assert await days.closer.close_due() == 1
    found = [await rows(tables, statement) for statement in RESULTS[:3]]
    told = await rows(tables, "SELECT * FROM outbox_rows ORDER BY row_number")
    assert len(told) == len(found[0]) == 3  # psi of x, psi of the score, coverage of 0
    late = outages(frame["request_id"].to_list(), (x > 0.5).tolist(), due_us - DAY_US)
    await handle(tables, monitor(versions), batch(OUTAGES, late))
    assert await days.closer.close_due() == 0
    assert [await rows(tables, statement) for statement in RESULTS[:3]] == found
    assert await rows(tables, "SELECT * FROM outbox_rows ORDER BY row_number") == told
    # The control: an open day with such labels measures more.
    async with tables.begin() as connection:
        for table in ("closed_days", "reports", "alerts"):
            await connection.execute(sa.text(f"DELETE FROM {table}"))
    assert await days.closer.close_due() == 1
    assert await number(tables, "reports") == 5


async def test_days_that_cannot_be_measured_are_closed_with_the_reason(
    tables: AsyncEngine, versions: Versions
) -> None:
    versions.learn(registration("changed"))
    versions.learn(registration("unlabelled", label=None))
    clock = HandClock()
    processor = monitor(versions, clock)
    parts = [
        predictions(name, DAYS[0], np.linspace(0, 1, 20))
        for name in ("changed", "unlabelled", "unknown")
    ]
    unit = batch(PREDICTIONS, pl.concat(parts))
    with pytest.raises(Retryable):
        await handle(tables, processor, unit)
    clock.now_s += 60
    await handle(tables, processor, unit)
    reference = [{"column": "x", "edges": [0.5], "counts": [1, 1, 0]}]
    versions.learn(registration("changed", sequence=2, reference=reference))
    days = Days(tables, versions)
    await days.promise(labels_until_us(DAYS[0], 24))
    assert await days.closer.close_due() == 3
    problems = dict(await rows(tables, "SELECT model, problem FROM closed_days"))
    assert "do not fit the reference" in problems["changed"]
    assert "not registered" in problems["unknown"]
    assert problems["unlabelled"] is None
    measured = await rows(tables, "SELECT model, detector FROM reports ORDER BY number")
    assert measured == [("unlabelled", "psi"), ("unlabelled", "score_psi")]


async def test_what_cannot_count_any_more_is_forgotten(
    tables: AsyncEngine, versions: Versions
) -> None:
    versions.learn(registration("m"))
    processor = monitor(versions)
    for start, day in enumerate(DAYS[:2]):
        frame = predictions("m", day, np.array([0.2]))
        await handle(tables, processor, batch(PREDICTIONS, frame, start=start))
        labelled = outages(frame["request_id"].to_list(), [True], day_end_us(day) - 1)
        await handle(tables, processor, batch(OUTAGES, labelled))
    days = Days(tables, versions, keep_days=2)
    await days.promise(labels_until_us(DAYS[2], 24))
    assert await days.closer.close_due() == 2
    assert await rows(tables, "SELECT DISTINCT day FROM scored ORDER BY 1") == [
        (DAYS[0],),
        (DAYS[1],),
    ]
    assert await number(tables, "labels") == 1  # of the second day
    await days.promise(labels_until_us("2013-03-04", 24))
    assert await days.closer.close_due() == 0
    assert await rows(tables, "SELECT day FROM scored") == [(DAYS[1],)]
    assert await number(tables, "labels") == 0
    assert await number(tables, "closed_days") == 2


if __name__ == "__main__":
    run_process(lambda: serve_privately(sys.argv[1], sys.argv[2]))
