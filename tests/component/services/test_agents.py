"""The agents service on real servers: reviews open once, end once, and say so."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import polars as pl
import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from causemesh.bus.kafka import KafkaBus
from causemesh.catalogue import Catalogue
from causemesh.codec.decode import Decoder
from causemesh.codec.encode import RegistryEncoders
from causemesh.codec.registry import HttpRegistry
from causemesh.local import Endpoints
from causemesh.log import LogReader, Span
from causemesh.runner import Emitter, Outgoing
from services.agents.decisions import Decisions
from services.agents.domain.review import ReviewWorkflow, opened_runs
from services.agents.domain.runs import Refused, Run, Signal, stable_id
from services.agents.events import REVIEWS, RUNS
from services.agents.handlers import PREDICTIONS
from services.agents.store import RunStore, metadata

pytestmark = pytest.mark.servers
ROOT = Path(__file__).parents[3]
WORKFLOW = ReviewWorkflow("late-arrival", 0.48, 0.52, 180_000_000, "keep")
TOKEN = "a-token-for-the-tests"
TASKS = "inference.tasks.realtime.v1"
COUNT = 300
MINUTE_US = 60_000_000


async def until(condition: Callable[[], Awaitable[bool]], timeout_s: float = 40) -> None:
    async with asyncio.timeout(timeout_s):
        while not await condition():  # noqa: ASYNC110 - polls another process
            await asyncio.sleep(0.05)


async def scalar(engine: AsyncEngine, statement: str, **values: Any) -> Any:
    async with engine.connect() as connection:
        return (await connection.execute(sa.text(statement), values)).scalar_one()


async def waiting(engine: AsyncEngine) -> int:
    """How many sessions of the database wait for a lock."""
    return int(
        await scalar(
            engine,
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE datname = current_database() AND wait_event_type = 'Lock'",
        )
    )


def predictions(tenant: str, count: int, base_us: int, *, score: float = 0.5) -> pl.DataFrame:
    """Predictions a millisecond apart; the even ones are uncertain."""
    at = pl.Series([base_us + 1_000 * n for n in range(count)]).cast(pl.Datetime("us", "UTC"))
    return pl.DataFrame(
        {
            "tenant_id": [tenant] * count,
            "occurred_at": at,
            "request_id": [f"{tenant}-{n}" for n in range(count)],
            "model": ["late-arrival"] * count,
            "version": pl.Series([1] * count, dtype=pl.Int32),
            "outcome": ["predicted"] * count,
            "score": [score if n % 2 == 0 else 0.9 for n in range(count)],
            "reason": pl.Series([None] * count, dtype=pl.String),
            "vector": [b"\0\0\0\0"] * count,
            "lane": ["realtime"] * count,
            "compute_ms": [0.1] * count,
            "predicted_at": at,
        }
    )


def runs_in(frame: pl.DataFrame) -> list[Run]:
    positions = np.arange(frame.height, dtype=np.int64)
    return opened_runs(WORKFLOW, frame, topic=PREDICTIONS, partition=0, positions=positions)


# Decisions against each other, on a database of their own.


@pytest.fixture
async def opened(database: AsyncEngine) -> tuple[AsyncEngine, str]:
    """A database with one open review, due at 180 s, and its id."""
    async with database.begin() as connection:
        await connection.run_sync(metadata.create_all)
        await RunStore(database).start(connection, runs_in(predictions("t", 1, 0)))
    return database, stable_id("review", "review", "t", "t-0")


def person(name: str) -> Signal:
    return Signal(name, 5, {"decision": name, "decided_by": "ann", "comment": None})


async def race(engine: AsyncEngine, *contenders: Coroutine[Any, Any, Any]) -> list[Any]:
    """Let each contender go as far as it can before any has written its step."""
    async with engine.begin() as blocker:
        await blocker.execute(sa.text("LOCK TABLE run_steps IN SHARE MODE"))
        tasks = [asyncio.create_task(one) for one in contenders]

        async def all_wait() -> bool:
            return await waiting(engine) == len(tasks)

        await until(all_wait, 10)
    return await asyncio.gather(*tasks, return_exceptions=True)


async def ends(engine: AsyncEngine) -> list[str]:
    async with engine.connect() as connection:
        rows = await connection.execute(sa.text("SELECT step FROM run_steps WHERE number = 1"))
        return list(rows.scalars())


async def test_of_two_decisions_one_wins(opened: tuple[AsyncEngine, str]) -> None:
    engine, review_id = opened
    decisions = Decisions(engine, RunStore(engine), WORKFLOW)
    rivals = [decisions.decide(review_id, person(name)) for name in ("approve", "reject")]
    results = await race(engine, *rivals)
    assert sorted(type(one).__name__ for one in results) == ["Refused", "Run"]
    (won,) = [one for one in results if isinstance(one, Run)]
    assert await ends(engine) == [won.newest.name]
    assert await scalar(engine, "SELECT status FROM reviews") == won.newest.name
    assert await scalar(engine, "SELECT count(*) FROM outbox_rows") == 2


async def test_without_the_row_lock_both_would_win(opened: tuple[AsyncEngine, str]) -> None:
    engine, review_id = opened
    unprotected = Decisions(engine, RunStore(engine, row_locks=False), WORKFLOW)
    # The steps' key still stops the second one, though not in words a person can use ...
    rivals = [unprotected.decide(review_id, person(name)) for name in ("approve", "reject")]
    results = await race(engine, *rivals)
    assert sorted(type(one).__name__ for one in results) == ["IntegrityError", "Run"]
    # ... and without that key nothing does.
    async with engine.begin() as connection:
        await connection.execute(sa.text("DELETE FROM run_steps WHERE number = 1"))
        await connection.execute(sa.text("UPDATE reviews SET status = 'opened'"))
        await connection.execute(sa.text("ALTER TABLE run_steps DROP CONSTRAINT run_steps_pkey"))
    rivals = [unprotected.decide(review_id, person(name)) for name in ("approve", "reject")]
    results = await race(engine, *rivals)
    assert [type(one) for one in results] == [Run, Run]
    assert sorted(await ends(engine)) == ["approved", "rejected"]


@pytest.mark.parametrize("time_out_first", [True, False])
async def test_a_decision_against_the_time_out(
    opened: tuple[AsyncEngine, str], time_out_first: bool
) -> None:
    engine, review_id = opened
    decisions = Decisions(engine, RunStore(engine), WORKFLOW)
    assert await decisions.time_out(179_999_999) == 0
    rivals = [decisions.decide(review_id, person("approve")), decisions.time_out(180_000_000)]
    results = await race(engine, *(reversed(rivals) if time_out_first else rivals))
    timed_out = results[0 if time_out_first else 1]
    decided = results[1 if time_out_first else 0]
    assert (timed_out, type(decided)) in [(1, Refused), (0, Run)]
    assert await ends(engine) == (["timed_out"] if timed_out else ["approved"])
    assert await scalar(engine, "SELECT count(*) FROM outbox_rows") == 2
    assert await decisions.time_out(10**15) == 0


async def test_only_one_instance_times_out_at_once(opened: tuple[AsyncEngine, str]) -> None:
    engine, _ = opened
    decisions = Decisions(engine, RunStore(engine), WORKFLOW)
    async with engine.begin() as blocker:
        await blocker.execute(sa.text("LOCK TABLE run_steps IN SHARE MODE"))
        first = asyncio.create_task(decisions.time_out(180_000_000))

        async def first_waits() -> bool:
            return await waiting(engine) == 1

        await until(first_waits, 10)
        assert await decisions.time_out(180_000_000) == 0
    assert await first == 1
    assert await ends(engine) == ["timed_out"]


async def test_a_request_that_is_known_opens_nothing(opened: tuple[AsyncEngine, str]) -> None:
    engine, _ = opened
    store = RunStore(engine)
    async with engine.begin() as connection:
        fresh = await store.start(connection, runs_in(predictions("t", 3, 99)))
    assert [run.request_id for run in fresh] == ["t-2"]
    assert await scalar(engine, "SELECT count(*) FROM run_steps") == 2


# The whole process.


class Log:
    """The test's own end of the log: writes predictions, reads what agents wrote."""

    def __init__(self, cluster: Endpoints) -> None:
        self.catalogue = Catalogue.load([ROOT / "tests" / "project"])
        self.bus = KafkaBus(cluster.kafka_bootstrap)
        self.registry = HttpRegistry(cluster.registry_url)
        self.producer = self.bus.producer("test-agents")
        self.emitter = Emitter(
            self.catalogue, RegistryEncoders(self.registry), self.producer, [PREDICTIONS]
        )
        self.reader = LogReader(self.bus, self.catalogue, Decoder(self.registry))
        self.cause_topic = f"test.{uuid.uuid4().hex}"
        self.position = 0
        self.before: dict[tuple[str, int], Span] = {}

    async def open(self) -> None:
        admin = self.bus.admin()
        topics = (PREDICTIONS, RUNS, REVIEWS, "mesh.deadletters.v1")
        await admin.ensure([self.catalogue.topic(name) for name in topics])
        await admin.close()
        self.before = await self.reader.ends([RUNS, REVIEWS])

    async def close(self) -> None:
        await self.producer.close()
        await self.registry.close()
        await self.bus.close()

    async def predict(self, frame: pl.DataFrame) -> None:
        positions = np.arange(self.position, self.position + frame.height, dtype=np.int64)
        self.position += frame.height
        keys = [name.encode() for name in frame["request_id"]]
        sent = Outgoing(PREDICTIONS, frame, keys, self.cause_topic, 0, positions)
        await self.emitter.send([sent], {})

    async def promise(self, at_us: int) -> None:
        """Move event time, as inference does."""
        sources = self.catalogue.source_partitions(PREDICTIONS)
        assert {topic for topic, _ in sources} == {TASKS}
        await self.emitter.send([], {(PREDICTIONS, *source): at_us for source in sources})

    async def written(self, topic: str, tenant: str) -> pl.DataFrame:
        """The tenant's records of a topic since `open`, each partition in order."""
        now = await self.reader.ends([topic])
        spans = {source: Span(self.before[source].last, span.last) for source, span in now.items()}
        frames = [batch.frame async for batch in self.reader.read(spans)]
        if not frames:
            return pl.DataFrame(schema={"run_id": pl.String})
        return pl.concat(frames).filter(pl.col("tenant_id") == tenant)


class Agents:
    """The service as a process of its own."""

    def __init__(self, cluster: Endpoints) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._environment = {
            **os.environ,
            **cluster.environment(),
            "CAUSEMESH_API_TOKEN": TOKEN,
            "CAUSEMESH_API_PORT": str(port),
            "CAUSEMESH_PROJECT": str(ROOT / "tests" / "project"),
            "CAUSEMESH_TIMEOUT_CHECK_S": "0.2",
        }
        self.process: subprocess.Popen[bytes] | None = None
        self.api = httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{port}", headers={"Authorization": f"Bearer {TOKEN}"}
        )

    def start(self) -> None:
        command = [sys.executable, "-m", "services.agents.app"]
        self.process = subprocess.Popen(
            command, env=self._environment, cwd=ROOT, stdout=subprocess.DEVNULL
        )

    def end(self, how: signal.Signals) -> int:
        assert self.process is not None
        self.process.send_signal(how)
        return self.process.wait(60)

    async def ready(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, "the service ended by itself"
        with suppress(httpx.TransportError):
            return (await self.api.get("/ready")).status_code == 200
        return False

    async def get(self, path: str, **params: Any) -> Any:
        answer = await self.api.get(f"/v1{path}", params=params)
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def reviews(self, **params: Any) -> list[dict[str, Any]]:
        """All pages of the list."""
        page = await self.get("/reviews", limit=40, **params)
        found: list[dict[str, Any]] = page["items"]
        while page["next_cursor"]:
            page = await self.get("/reviews", limit=40, cursor=page["next_cursor"], **params)
            found += page["items"]
        return found


@pytest.fixture
async def log(cluster: Endpoints) -> AsyncIterator[Log]:
    made = Log(cluster)
    await made.open()
    yield made
    await made.close()


@pytest.fixture
async def agents(cluster: Endpoints, log: Log) -> AsyncIterator[Agents]:
    made = Agents(cluster)
    yield made
    await made.api.aclose()
    if made.process is not None and made.process.poll() is None:
        made.process.kill()
        made.process.wait()


@pytest.fixture
async def service_database(cluster: Endpoints) -> AsyncIterator[AsyncEngine]:
    """The service's own database, empty."""
    server = create_async_engine(cluster.database("postgres"), isolation_level="AUTOCOMMIT")
    async with server.connect() as connection:
        await connection.execute(sa.text("DROP DATABASE IF EXISTS agents WITH (FORCE)"))
        await connection.execute(sa.text("CREATE DATABASE agents"))
    await server.dispose()
    engine = create_async_engine(cluster.database("agents"))
    yield engine
    await engine.dispose()


async def test_reviews_survive_a_crash_and_end_by_people_or_by_time(
    log: Log, service_database: AsyncEngine, agents: Agents
) -> None:
    agents.start()
    await until(agents.ready)
    base_us = await present_us(log, service_database)
    tenant = f"t{uuid.uuid4().hex}"
    frame = predictions(tenant, 2 * COUNT, base_us)
    await crash_in_a_unit(log, service_database, agents, frame)

    expected = {run.run_id for run in runs_in(frame)}
    await until(lambda: count_is(log, tenant, COUNT))
    await check_opened(log, service_database, tenant, expected)

    found = await agents.reviews(tenant_id=tenant)
    assert {one["run_id"] for one in found} == expected
    due = [datetime.fromisoformat(one["due_at"]) for one in found]
    assert due == sorted(due)
    await check_decisions(agents, found[0], found[1])

    # Half of event time passes, then all of it.
    half = COUNT // 2
    await log.promise(base_us + 3 * MINUTE_US + 2_000 * (half - 1))
    await until(lambda: all_ended(agents, tenant, COUNT - half))
    waiting_still = await agents.reviews(tenant_id=tenant, status="opened")
    assert waiting_still == found[half:]
    await log.promise(base_us + 4 * MINUTE_US)
    await until(lambda: all_ended(agents, tenant, 0))
    await until(lambda: count_is(log, tenant, 2 * COUNT))
    await check_ended(log, tenant, found)
    late = await agents.api.post(
        f"/v1/reviews/{found[2]['review_id']}/approve", json={"decided_by": "ann"}
    )
    assert (late.status_code, late.json()["review"]["status"]) == (409, "timed_out")
    assert agents.end(signal.SIGTERM) == 0


async def present_us(log: Log, engine: AsyncEngine) -> int:
    """An event time beyond what any earlier test has promised on the predictions."""
    tenant = f"probe{uuid.uuid4().hex}"
    await log.predict(predictions(tenant, 80, 0))
    await log.promise(0)

    async def all_partitions_read() -> bool:
        statement = "SELECT count(*) FROM runs WHERE tenant_id = :tenant"
        return bool(await scalar(engine, statement, tenant=tenant) == 40)

    await until(all_partitions_read)
    reached = await scalar(engine, "SELECT coalesce(max(watermark_us), 0) FROM checkpoints")
    return int(reached) + MINUTE_US


async def crash_in_a_unit(
    log: Log, engine: AsyncEngine, agents: Agents, frame: pl.DataFrame
) -> None:
    """Kill -9 with a unit half written: its runs are in, its reviews wait for a lock."""
    async with engine.begin() as blocker:
        await blocker.execute(sa.text("LOCK TABLE reviews IN SHARE MODE"))
        await log.predict(frame)

        async def a_unit_waits() -> bool:
            return await waiting(engine) > 0

        await until(a_unit_waits)
        agents.end(signal.SIGKILL)
    written = "SELECT count(*) FROM runs WHERE tenant_id = :tenant"
    assert await scalar(engine, written, tenant=frame["tenant_id"][0]) < COUNT
    agents.start()
    await until(agents.ready)


async def count_is(log: Log, tenant: str, count: int) -> bool:
    written = [await log.written(topic, tenant) for topic in (RUNS, REVIEWS)]
    return all(frame.height >= count for frame in written)


async def all_ended(agents: Agents, tenant: str, left: int) -> bool:
    page = await agents.get("/reviews", tenant_id=tenant, status="opened", limit=500)
    return len(page["items"]) == left


async def check_opened(log: Log, engine: AsyncEngine, tenant: str, expected: set[str]) -> None:
    steps = await log.written(RUNS, tenant)
    reviews = await log.written(REVIEWS, tenant)
    assert sorted(steps["run_id"]) == sorted(reviews["run_id"]) == sorted(expected)
    assert set(steps["step"]) == set(reviews["status"]) == {"opened"}
    causes = pl.concat([steps["cause"], reviews["cause"]]).struct.unnest()
    assert set(causes["topic"]) == {"outbox.agents"}
    # Each event names the prediction that led to it, which is where the run says it came from.
    async with engine.connect() as connection:
        statement = "SELECT run_id, origin_topic, origin_partition, origin_position FROM runs"
        rows = await connection.execute(sa.text(statement + " WHERE tenant_id = :t"), {"t": tenant})
        stored = {row[0]: tuple(row[1:]) for row in rows}
    named = steps.select("run_id", pl.col("cause").struct.field("origin"))
    origins = {run: tuple(origin.values()) for run, origin in named.iter_rows()}
    assert origins == stored
    topic, partition, position = next(iter(origins.values()))
    batch = await log.reader.one(topic, partition, position)
    assert batch is not None
    request_id = batch.frame["request_id"][0]
    assert stable_id("run", "review", tenant, request_id) == next(iter(origins))


async def check_decisions(agents: Agents, first: dict[str, Any], second: dict[str, Any]) -> None:
    path = f"/v1/reviews/{first['review_id']}"
    ask = {"decided_by": "ann", "comment": "looks right"}
    refused = await agents.api.post(f"{path}/approve", json=ask, headers={"Authorization": "no"})
    assert refused.status_code == 401
    done = await agents.api.post(f"{path}/approve", json=ask)
    assert done.status_code == 200
    assert done.json()["status"] == "approved"
    again = await agents.api.post(f"{path}/approve", json={"decided_by": "bob"})
    assert (again.status_code, again.json()) == (200, done.json())
    other = await agents.api.post(f"{path}/reject", json=ask)
    assert other.status_code == 409
    assert other.json()["type"] == "urn:causemesh:problem:already_decided"
    assert other.json()["review"] == done.json()
    assert await agents.get(f"/reviews/{first['review_id']}") == done.json()
    rejected = await agents.api.post(
        f"/v1/reviews/{second['review_id']}/reject", json={"decided_by": "bob"}
    )
    assert rejected.json()["decision"] == "reject"
    run = await agents.get(f"/runs/{first['run_id']}")
    assert [(step["number"], step["step"]) for step in run["steps"]] == [
        (0, "opened"),
        (1, "approved"),
    ]
    assert run["steps"][1]["result"] == {"decision": "approve", **ask}
    assert run["origin"]["topic"] == PREDICTIONS
    for missing in (f"reviews/{uuid.uuid4()}", f"runs/{uuid.uuid4()}"):
        assert (await agents.api.get(f"/v1/{missing}")).status_code == 404
    for bad in ({"decided_by": ""}, {"decided_by": "a\0b"}, {}):
        assert (await agents.api.post(f"{path}/approve", json=bad)).status_code == 422


async def check_ended(log: Log, tenant: str, found: Sequence[dict[str, Any]]) -> None:
    reviews = await log.written(REVIEWS, tenant)
    steps = await log.written(RUNS, tenant)
    assert reviews.height == steps.height == 2 * COUNT
    history = steps.group_by("run_id", maintain_order=True).agg("number", "step")
    assert set(history["number"].map_elements(tuple, return_dtype=pl.Object)) == {(0, 1)}
    by_status = dict(reviews["status"].value_counts().iter_rows())
    assert by_status == {"opened": COUNT, "approved": 1, "rejected": 1, "timed_out": COUNT - 2}
    assert {found[n]["review_id"] for n in (0, 1)} == set(
        reviews.filter(pl.col("status").is_in(["approved", "rejected"]))["review_id"]
    )
    late = reviews.filter(pl.col("status") == "timed_out")
    assert (late["occurred_at"] == late["due_at"]).all()
    assert set(late["decision"]) == {"keep"}
    # In order of their due times within each shard of the outbox.
    causes = late.select("due_at", "review_id", pl.col("cause").struct.unnest())
    for _, shard in causes.sort("position").group_by("partition", maintain_order=True):
        order = shard.select("due_at", "review_id").rows()
        assert order == sorted(order)
