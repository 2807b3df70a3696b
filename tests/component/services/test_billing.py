"""Billing on real servers: each event is paid for once, whoever is killed and whatever Stripe does.

The process runs on a project of its own whose event types nobody else uses, so that event time is
this test's alone; the meters are those of tests/project/billing.yaml.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from datetime import UTC, datetime
from decimal import ROUND_HALF_EVEN, Decimal
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import polars as pl
import pytest
import sqlalchemy as sa
import yaml
from aiokafka import TopicPartition as KafkaPartition
from aiokafka.admin import AIOKafkaAdminClient, RecordsToDelete
from prometheus_client import CollectorRegistry
from prometheus_client import Counter as CounterMetric
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from causemesh.bus.kafka import KafkaBus
from causemesh.bus.memory import MemoryBus
from causemesh.catalogue import DEADLETTERS, Catalogue
from causemesh.clock import SystemClock
from causemesh.codec.decode import Decoder
from causemesh.codec.encode import RegistryEncoders
from causemesh.codec.registry import HttpRegistry, MemoryRegistry
from causemesh.errors import Misdeclared
from causemesh.local import Endpoints
from causemesh.local.stripe import create_app, make_server
from causemesh.log import LogReader, Span
from causemesh.positions_sql import SqlPositionStore
from causemesh.runner import Batch, Emitter, Limits, Outgoing, PartitionWorker
from services.billing.books import CLOSER, PUSHER, Books, Head, Terms, locked
from services.billing.closing import MonthCloser
from services.billing.domain.invoicing import close_month
from services.billing.domain.plans import parse_billing
from services.billing.domain.usage import UsageRow
from services.billing.entitlements import ENTITLEMENTS, announce_changes
from services.billing.events import INVOICES
from services.billing.gateways import Bill, Payments, open_stripe
from services.billing.handlers import Metering, stage_of
from services.billing.lateness import Promises
from services.billing.pushing import Pusher
from services.billing.settings import BillingSettings
from services.billing.store import UsageStore, metadata

pytestmark = pytest.mark.servers
ROOT = Path(__file__).parents[3]
TOKEN = "a-token-for-the-billing-test"
JANUARY, FEBRUARY, MARCH = MONTHS = ("2013-01", "2013-02", "2013-03")
HOUR_US = 3600 * 10**6
GRACE_US = 6 * HOUR_US
MODEL = yaml.safe_load((ROOT / "tests" / "project" / "billing.yaml").read_text())


def start_of(month: str) -> int:
    return round(datetime.strptime(month, "%Y-%m").replace(tzinfo=UTC).timestamp() * 1e6)


def over(month: str) -> int:
    """The watermark that closes a month, microseconds."""
    following = {JANUARY: FEBRUARY, FEBRUARY: MARCH, MARCH: "2013-04"}[month]
    return start_of(following) + GRACE_US


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


async def until(condition: Callable[[], Awaitable[bool]], timeout_s: float = 90) -> None:
    async with asyncio.timeout(timeout_s):
        while not await condition():  # noqa: ASYNC110 - polls another process
            await asyncio.sleep(0.05)


class Project:
    """tests/project's meters over two event types with names of their own."""

    def __init__(self, folder: Path) -> None:
        name = uuid.uuid4().hex
        self.folder = folder
        self.answers, self.readings = f"events.answer_{name}", f"events.reading_{name}"
        (folder / "events").mkdir(parents=True)
        shutil.copy(ROOT / "schemas/records/PredictionMade.avsc", folder / "events")
        shutil.copy(ROOT / "tests/project/events/Reading.avsc", folder / "events")
        types = {
            f"answer_{name}": {"record": "PredictionMade", "key": "request_id"},
            f"reading_{name}": {"record": "Reading", "key": "sensor"},
        }
        (folder / "catalogue.yaml").write_text(yaml.safe_dump({"event_types": types}))
        billing = (ROOT / "tests/project/billing.yaml").read_text()
        billing = billing.replace("inference.predictions.v1", self.answers)
        (folder / "billing.yaml").write_text(billing.replace("events.reading", self.readings))
        self.catalogue = Catalogue.load([folder])


class Log:
    """The test's own end of the log: writes what is metered, reads what billing wrote."""

    def __init__(self, cluster: Endpoints, project: Project) -> None:
        self.project = project
        self.bus = KafkaBus(cluster.kafka_bootstrap)
        self.registry = HttpRegistry(cluster.registry_url)
        self.producer = self.bus.producer("test-billing")
        topics = [project.answers, project.readings]
        self.emitter = Emitter(
            project.catalogue, RegistryEncoders(self.registry), self.producer, topics
        )
        self.reader = LogReader(self.bus, project.catalogue, Decoder(self.registry))
        self.sent: list[Outgoing] = []
        self.before: dict[tuple[str, int], Span] = {}

    async def open(self) -> None:
        admin = self.bus.admin()
        names = (self.project.answers, self.project.readings, INVOICES, ENTITLEMENTS)
        await admin.ensure([self.project.catalogue.topic(name) for name in names])
        await admin.close()
        self.before = await self.reader.ends([INVOICES, ENTITLEMENTS])

    async def close(self) -> None:
        await self.producer.close()
        await self.registry.close()
        await self.bus.close()

    async def send(self, topic: str, frame: pl.DataFrame, key: str) -> None:
        """Facts as ingest would send them."""
        start = sum(len(one) for one in self.sent)
        positions = np.arange(start, start + frame.height, dtype=np.int64)
        keys = [text.encode() for text in frame[key]]
        inbox = topic.replace("events.", "inbox.")
        self.sent.append(Outgoing(topic, frame, keys, inbox, 0, positions))
        await self.emitter.send(self.sent[-1:], {})

    async def repeat(self) -> None:
        """Send everything again under the same causes, as a producer does after a crash."""
        await self.emitter.send(self.sent, {})

    async def promise(self, at_us: int) -> None:
        """Move event time, as ingest does."""
        topics = (self.project.answers, self.project.readings)
        sources = {
            (topic, *source): at_us
            for topic in topics
            for source in self.project.catalogue.source_partitions(topic)
        }
        await self.emitter.send([], sources)

    async def written(self, topic: str, tenants: Sequence[str]) -> pl.DataFrame:
        """The tenants' records of a topic since `open`, each partition in order."""
        now = await self.reader.ends([topic])
        spans = {source: Span(self.before[source].last, span.last) for source, span in now.items()}
        frames = [batch.frame async for batch in self.reader.read(spans)]
        return pl.concat(frames).filter(pl.col("tenant_id").is_in(tenants))


def answers(
    tenant: str, month: str, count: int, *, hours: float = 5.0, seed: int = 0
) -> pl.DataFrame:
    """Outcomes some hours apart, most of them predicted."""
    at = [start_of(month) + round(n * hours * HOUR_US) for n in range(count)]
    when = pl.Series(at).cast(pl.Datetime("us", "UTC"))
    ids = [f"{tenant}-{month}-{seed}-{n}" for n in range(count)]
    cost = np.random.default_rng(seed).random(count).round(6) * 1_000
    return pl.DataFrame(
        {
            "event_id": ids,
            "tenant_id": [tenant] * count,
            "occurred_at": when,
            "request_id": ids,
            "model": ["m"] * count,
            "version": pl.Series([1] * count, dtype=pl.Int32),
            "outcome": ["failed" if n % 7 == 3 else "predicted" for n in range(count)],
            "score": [0.5] * count,
            "reason": pl.Series([None] * count, dtype=pl.String),
            "vector": [b"\0\0\0\0"] * count,
            "lane": ["realtime"] * count,
            "compute_ms": cost,
            "predicted_at": when,
        }
    )


def readings(tenant: str, month: str, count: int, *, seed: int = 0) -> pl.DataFrame:
    at = [start_of(month) + 7 * HOUR_US * n for n in range(count)]
    return pl.DataFrame(
        {
            "event_id": [f"{tenant}-{month}-{seed}-reading{n}" for n in range(count)],
            "tenant_id": [tenant] * count,
            "occurred_at": pl.Series(at).cast(pl.Datetime("us", "UTC")),
            "sensor": [f"s{n % (5 + seed)}" for n in range(count)],
            "site": pl.Series([None] * count, dtype=pl.String),
            "value": [None if n % 5 == 4 else float((n * 37 + seed) % 101) for n in range(count)],
        }
    )


class Stripe:
    """The stand-in as a process, or in a thread where its keys are to be ignored."""

    def __init__(self, url: str) -> None:
        self.url = url
        headers = {"Authorization": "Bearer sk_test_local"}
        self.api = httpx.Client(base_url=url, headers=headers)

    def fault(self, kind: int | str, where: str, **more: Any) -> None:
        method, path = where.split()
        fault = {"next": kind, "method": method, "path": path, **more}
        assert self.api.post("/_faults", json=fault).status_code == 200

    def calls(self, where: str) -> int:
        return int(self.api.get("/_calls").json().get(where, 0))

    def all(self, path: str, **params: Any) -> list[dict[str, Any]]:
        page = self.api.get(path, params={"limit": 100, **params}).json()
        assert not page["has_more"]
        found: list[dict[str, Any]] = page["data"]
        return found


CUSTOMERS, DRAFTS, ITEMS = "POST /v1/customers", "POST /v1/invoices", "POST /v1/invoiceitems"
FINALISE = "POST /v1/invoices/{id}/finalize"


@pytest.fixture
def stripe_standin(tmp_path: Path) -> Iterator[Stripe]:
    port = free_port()
    argv = ["-m", "causemesh.local.stripe", "--port", str(port), "--faults"]
    command = [sys.executable, *argv, "--data", str(tmp_path / "stripe.db")]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as running:
        made = Stripe(f"http://127.0.0.1:{port}")
        deadline = time.monotonic() + 60
        while True:
            with suppress(httpx.TransportError):
                made.api.get("/_calls")
                break
            assert time.monotonic() < deadline, "the stand-in did not start"
            time.sleep(0.05)
        yield made
        made.api.close()
        running.terminate()


class Billing:
    """The service as a process of its own, on the database `billing`."""

    def __init__(self, cluster: Endpoints, project: Project, stripe_url: str, log: Path) -> None:
        port = free_port()
        self._environment = {
            **os.environ,
            **cluster.environment(),
            "CAUSEMESH_API_TOKEN": TOKEN,
            "CAUSEMESH_API_PORT": str(port),
            "CAUSEMESH_PROJECT": str(project.folder),
            "CAUSEMESH_STRIPE_URL": stripe_url,
            "CAUSEMESH_CLOSE_POLL_S": "0.2",
            "CAUSEMESH_PUSH_POLL_S": "0.1",
            "CAUSEMESH_REPORT_POLL_S": "0.2",
            "POLARS_MAX_THREADS": "1",
        }
        self._log = log
        self.process: subprocess.Popen[bytes] | None = None
        self.api = httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{port}",
            headers={"Authorization": f"Bearer {TOKEN}"},
            timeout=30,
        )

    async def start(self) -> None:
        with self._log.open("ab") as log:
            command = [sys.executable, "-m", "services.billing.app"]
            self.process = subprocess.Popen(  # noqa: ASYNC220 - returns at once
                command, env=self._environment, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT
            )
        await until(self.ready)

    def end(self, how: signal.Signals) -> int:
        assert self.process is not None
        self.process.send_signal(how)
        return self.process.wait(60)

    async def ready(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self._log.read_text()[-3000:]
        with suppress(httpx.TransportError):
            return (await self.api.get("/ready")).status_code == 200
        return False

    async def get(self, path: str, **params: Any) -> Any:
        answer = await self.api.get(f"/v1{path}", params=params)
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def pages(self, path: str, **params: Any) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        cursor: dict[str, Any] = {}
        while True:
            page = await self.get(path, limit=3, **params, **cursor)
            found += page["items"]
            if page["next_cursor"] is None:
                return found
            cursor = {"cursor": page["next_cursor"]}

    async def recount(self, period: str) -> Any:
        answer = await self.api.post("/v1/recount", params={"period": period})
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def count(self, metric: str) -> float:
        metrics = (await self.api.get("/metrics")).text
        return sum(
            float(line.rpartition(" ")[2])
            for line in metrics.splitlines()
            if line.startswith(f"causemesh_{metric}")
        )

    async def told(self, metric: str, value: float) -> None:
        """Wait until a metric has a value."""

        async def reached() -> bool:
            return await self.count(metric) == value

        await until(reached, timeout_s=20)

    async def settled(self, count: int) -> bool:
        """Whether there are so many invoices, and all are at Stripe or set aside."""
        assert await self.ready()
        states = [one["status"] for one in (await self.get("/invoices", limit=500))["items"]]
        return len(states) == count and "closed" not in states


@asynccontextmanager
async def fresh_database(cluster: Endpoints) -> AsyncIterator[AsyncEngine]:
    server = create_async_engine(cluster.database("postgres"), isolation_level="AUTOCOMMIT")
    async with server.connect() as connection:
        await connection.execute(sa.text("DROP DATABASE IF EXISTS billing WITH (FORCE)"))
        await connection.execute(sa.text("CREATE DATABASE billing"))
    await server.dispose()
    engine = create_async_engine(cluster.database("billing"))
    yield engine
    await engine.dispose()


async def rows(engine: AsyncEngine, statement: str) -> list[tuple[Any, ...]]:
    async with engine.connect() as connection:
        return [tuple(row) for row in await connection.execute(sa.text(statement))]


# An independent recount: plain Python over the sent rows, apart from the service's domain.

Used = Mapping[str, Decimal]


def used(sent: Sequence[tuple[str, dict[str, Any]]]) -> Used:
    """Quantities of one tenant and month."""
    made = [row for kind, row in sent if kind == "answer"]
    read = [row for kind, row in sent if kind == "reading"]
    values = [(row["occurred_at"], row["value"]) for row in read if row["value"] is not None]
    micro = sum(round(Decimal(row["compute_ms"]) * 10**6) for row in made)
    return {
        "predictions": Decimal(sum(row["outcome"] == "predicted" for row in made)),
        "compute_ms": Decimal(micro) / 10**6,
        "sensors": Decimal(len({row["sensor"] for row in read})),
        "peak": Decimal(max((value for _, value in values), default=0)),
        "level": Decimal(max(values)[1] if values else 0),
    }


def owed(quantities: Used) -> list[int]:
    """What each tier of each meter costs in cents."""
    amounts = []
    for meter, price in MODEL["plans"]["standard"]["prices"].items():
        left = max(quantities[meter] - price["included"], Decimal(0))
        floor = 0
        for tier in price["tiers"]:
            units = min(left, Decimal(tier["up_to"] - floor)) if "up_to" in tier else left
            cents = units * Decimal(tier["unit"]) * 100
            amounts.append(int(cents.quantize(Decimal(1), rounding=ROUND_HALF_EVEN)))
            left, floor = left - units, tier.get("up_to", 0)
    return amounts


class Recounter:
    """What was sent, by tenant, month and the month whose invoice it belongs on."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, str, str, str, dict[str, Any]]] = []

    def add(self, frame: pl.DataFrame, due: str) -> None:
        kind = "answer" if "outcome" in frame.columns else "reading"
        for row in frame.to_dicts():
            month = row["occurred_at"].strftime("%Y-%m")
            self.sent.append((row["tenant_id"], month, due, kind, row))

    def total(self, tenant: str, period: str) -> int:
        """What the invoice comes to: usage known by then less what was known before."""
        total = 0
        for month in sorted({one[1] for one in self.sent if one[0] == tenant and one[1] <= period}):
            known = [one for one in self.sent if one[:2] == (tenant, month)]
            now = [(kind, row) for _, _, due, kind, row in known if due <= period]
            before = [(kind, row) for _, _, due, kind, row in known if due < period]
            total += sum(owed(used(now))) - sum(owed(used(before)))
            total += 4900 * (bool(now) - bool(before))
        return total


@pytest.fixture
async def log(cluster: Endpoints, tmp_path: Path) -> AsyncIterator[Log]:
    made = Log(cluster, Project(tmp_path / "project"))
    await made.open()
    yield made
    await made.close()


@asynccontextmanager
async def serving(billing: Billing) -> AsyncIterator[Billing]:
    try:
        yield billing
    finally:
        await billing.api.aclose()
        if billing.process is not None and billing.process.poll() is None:
            billing.process.kill()
            billing.process.wait()


async def test_every_event_is_paid_for_once(
    cluster: Endpoints, log: Log, stripe_standin: Stripe, tmp_path: Path
) -> None:
    def process(name: str) -> Billing:
        return Billing(cluster, log.project, stripe_standin.url, tmp_path / name)

    story = Story(log, stripe_standin)
    async with fresh_database(cluster) as engine, serving(process("first")) as billing:
        await billing.start()
        await story.january(billing, engine)
        await story.february(billing, engine)
        march = await story.march(billing, engine)
        await check_entitlements(log)
        await check_events(log, await billing.pages("/invoices"))
        await check_api(billing)
        assert billing.end(signal.SIGTERM) == 0
        first = [await rows(engine, statement) for statement in RESULTS]

    # The same log once more from nothing: other batches, the same results, and none twice.
    async with fresh_database(cluster) as engine, serving(process("second")) as again:
        await again.start()
        await until(lambda: again.settled(6))
        for before, after in zip(first, [await rows(engine, one) for one in RESULTS], strict=True):
            assert after == before
            assert after
        await check_stripe(stripe_standin, [*await again.pages("/invoices"), march])
        # What was tampered with is not as the log has it, and Stripe's copy never changes.
        (wrong,) = await again.pages("/invoices", status="mismatch")
        assert wrong["invoice_id"] == march["invoice_id"]
        assert wrong["total_minor"] == story.recount.total("A", MARCH) != march["total_minor"]
        await check_what_the_log_lost(cluster, log, again)
        assert f"a total of {march['total_minor']}" in wrong["problem"]
        await again.told('billing_invoices{status="mismatch"}', 1)
        money = 'billing_invoiced_minor{currency="usd",status="mismatch"}'
        await again.told(money, wrong["total_minor"])
        await again.told("outbox_rows ", 0)


UNTAMPERED = "WHERE period < '2013-03' ORDER BY"
RESULTS = (
    f"SELECT invoice_id, total_minor, stripe_id FROM invoices {UNTAMPERED} 1",
    f"SELECT lines.*::text FROM lines JOIN invoices USING (invoice_id) {UNTAMPERED} line_id",
    f"SELECT period, tenant_id, meter, usage_period, quantity_micro, ranges::text"
    f" FROM closed_usage {UNTAMPERED} 1, 2, 3, 4",
    f"SELECT * FROM billed {UNTAMPERED} 1, 2, 3, 4",
    f"SELECT * FROM ledger {UNTAMPERED} 1, 2",
)


class Story:
    """Three months of two tenants."""

    def __init__(self, log: Log, stripe: Stripe) -> None:
        self.log = log
        self.stripe = stripe
        self.recount = Recounter()

    async def send(self, frame: pl.DataFrame, due: str) -> None:
        self.recount.add(frame, due)
        if "outcome" in frame.columns:
            await self.log.send(self.log.project.answers, frame, "request_id")
        else:
            await self.log.send(self.log.project.readings, frame, "sensor")

    async def january(self, billing: Billing, engine: AsyncEngine) -> None:
        """A crash in a unit, replays, and every fault that Stripe has."""
        async with engine.begin() as blocker:
            await blocker.execute(sa.text("LOCK TABLE tenants IN SHARE MODE"))
            for tenant, count in (("A", 100), ("B", 40)):
                await self.send(answers(tenant, JANUARY, count), JANUARY)
                await self.send(readings(tenant, JANUARY, count // 2), JANUARY)
            # A unit with its buckets written waits to note its tenants.
            await until(lambda: waits_for_lock(engine))
            billing.end(signal.SIGKILL)
        assert await rows(engine, "SELECT 1 FROM usage_buckets") == []
        await billing.start()
        await self.log.repeat()
        self.stripe.fault(500, CUSTOMERS)
        self.stripe.fault(500, CUSTOMERS, when="after")
        self.stripe.fault("timeout_after_commit", DRAFTS)
        self.stripe.fault(500, DRAFTS, when="after")
        self.stripe.fault(429, ITEMS)
        self.stripe.fault(500, ITEMS)
        self.stripe.fault("timeout_after_commit", ITEMS)
        self.stripe.fault(500, FINALISE)
        self.stripe.fault("timeout_after_commit", FINALISE)
        await self.log.promise(over(JANUARY))
        await until(lambda: billing.settled(2))
        # Each of the nine faults has cost a try.
        assert await billing.count('outcomes_total{kind="push",outcome="retried"}') >= 9
        await self.check(billing, JANUARY)

    async def february(self, billing: Billing, engine: AsyncEngine) -> None:
        """Late usage, and kill -9 in the middle of pushing, twice."""
        await self.send(answers("A", JANUARY, 30, seed=1), FEBRUARY)
        await self.send(readings("B", JANUARY, 20, seed=2), FEBRUARY)
        for tenant in ("A", "B"):
            await self.send(answers(tenant, FEBRUARY, 70), FEBRUARY)
        self.stripe.fault("slow", ITEMS, count=12, delay_ms=250)
        self.stripe.fault("slow", FINALISE, count=4, delay_ms=500)
        begun = {where: self.stripe.calls(where) for where in (ITEMS, FINALISE)}
        await self.log.promise(over(FEBRUARY))
        for where, calls in ((ITEMS, 3), (FINALISE, 1)):

            async def in_the_middle(where: str = where, calls: int = calls) -> bool:
                return self.stripe.calls(where) >= begun[where] + calls

            await until(in_the_middle)
            billing.end(signal.SIGKILL)
            await billing.start()
        await until(lambda: billing.settled(4))
        await self.check(billing, FEBRUARY)

    async def march(self, billing: Billing, engine: AsyncEngine) -> dict[str, Any]:
        """A bucket that somebody has changed; returns the invoice that has it."""
        await self.send(answers("A", MARCH, 50), MARCH)
        await self.send(answers("B", MARCH, 50), MARCH)
        # March is metered when its watermark, one short of the end, has been committed.
        await self.log.promise(over(MARCH) - 1)
        await until(lambda: reached(engine, over(MARCH) - 1))
        async with engine.begin() as connection:
            tampered = await connection.execute(
                sa.text(
                    "UPDATE usage_buckets SET quantity_micro = quantity_micro + 1000000"
                    " WHERE (tenant_id, meter, hour_us, partition) = (SELECT tenant_id, meter,"
                    " hour_us, partition FROM usage_buckets WHERE tenant_id = 'A'"
                    " AND meter = 'predictions' AND usage_period = '2013-03' LIMIT 1)"
                )
            )
            assert tampered.rowcount == 1
        await self.log.promise(over(MARCH))
        await until(lambda: billing.settled(6))
        (wrong,) = await billing.pages("/invoices", tenant_id="A", period=MARCH)
        (right,) = await billing.pages("/invoices", tenant_id="B", period=MARCH)
        assert right["total_minor"] == self.recount.total("B", MARCH)
        assert wrong["total_minor"] != self.recount.total("A", MARCH)
        recount = await billing.recount(MARCH)
        assert recount == {"equal": False, "invoices": 2, "differing": [wrong["invoice_id"]]}
        assert (await billing.recount(JANUARY))["equal"]
        proofs = {
            (line["meter"], line["tier"]): await billing.get(f"/lines/{line['line_id']}/verify")
            for line in (await billing.get(f"/invoices/{wrong['invoice_id']}"))["lines"]
        }
        assert {at for at, proof in proofs.items() if not proof["equal"]} == {("predictions", 1)}
        proof = proofs["predictions", 1]
        assert proof["quantity_micro"] == proof["recomputed_quantity_micro"] + 10**6
        assert proof["records"] == 43
        await check_stripe(self.stripe, await billing.pages("/invoices"))
        return wrong

    async def check(self, billing: Billing, period: str) -> None:
        """The month's invoices equal the recount, come out of the log again, and are at Stripe."""
        found = await billing.pages("/invoices", period=period)
        assert {one["tenant_id"]: one["total_minor"] for one in found} == {
            tenant: self.recount.total(tenant, period) for tenant in ("A", "B")
        }
        recount = await billing.recount(period)
        assert recount == {"equal": True, "invoices": 2, "differing": []}
        for one in found:
            invoice = await billing.get(f"/invoices/{one['invoice_id']}")
            assert sum(line["amount_minor"] for line in invoice["lines"]) == one["total_minor"]
            for line in invoice["lines"]:
                proof = await billing.get(f"/lines/{line['line_id']}/verify")
                assert proof["equal"], (line, proof)
        months = {line["usage_period"] for line in invoice["lines"]}
        assert months == ({JANUARY} if period == JANUARY else {JANUARY, FEBRUARY})
        await check_stripe(self.stripe, await billing.pages("/invoices"))


async def waits_for_lock(engine: AsyncEngine) -> bool:
    waiting = await rows(
        engine,
        "SELECT 1 FROM pg_stat_activity"
        " WHERE datname = current_database() AND wait_event_type = 'Lock'",
    )
    return bool(waiting)


async def reached(engine: AsyncEngine, at_us: int) -> bool:
    found = await rows(engine, "SELECT min(watermark_us), count(*) FROM checkpoints")
    return found[0][0] is not None and (found[0][0] >= at_us and found[0][1] == 4)


async def check_stripe(stripe: Stripe, invoices: Sequence[Mapping[str, Any]]) -> None:
    """Exactly one customer a tenant, and one frozen invoice each with the same lines."""
    customers = Counter(one["metadata"]["causemesh_tenant"] for one in stripe.all("/v1/customers"))
    assert customers == {"A": 1, "B": 1}
    bills = {one["metadata"]["causemesh_invoice"]: one for one in stripe.all("/v1/invoices")}
    assert len(bills) == len(stripe.all("/v1/invoices"))
    assert bills.keys() == {one["invoice_id"] for one in invoices}
    for one in invoices:
        bill = bills[one["invoice_id"]]
        assert bill["status"] == "open"
        assert bill["metadata"]["causemesh_tenant"] == one["tenant_id"]
        items = stripe.all("/v1/invoiceitems", invoice=bill["id"])
        assert len({item["metadata"]["causemesh_line"] for item in items}) == len(items)
        if one["status"] == "finalised":
            assert (bill["id"], bill["total"]) == (one["stripe_id"], one["total_minor"])
            assert sum(item["amount"] for item in items) == one["total_minor"]


async def check_entitlements(log: Log) -> None:
    """Each tenant was told once, because of a record of its own."""

    async def told() -> bool:
        return (await log.written(ENTITLEMENTS, ["A", "B"])).height >= 2

    await until(told)
    found = await log.written(ENTITLEMENTS, ["A", "B"])
    assert sorted(found["tenant_id"]) == ["A", "B"]
    for row in found.to_dicts():
        assert (row["plan"], row["active"], row["models"]) == ("standard", True, ["*"])
        assert (row["sequence"], row["cause"]["topic"]) == (1, "outbox.billing")
        origin = row["cause"]["origin"]
        batch = await log.reader.one(origin["topic"], origin["partition"], origin["position"])
        assert batch is not None
        assert batch.frame["tenant_id"].to_list() == [row["tenant_id"]]


async def check_events(log: Log, invoices: Sequence[Mapping[str, Any]]) -> None:
    """Every invoice was closed, then finalised; each event names the usage behind it."""

    async def told() -> bool:
        return (await log.written(INVOICES, ["A", "B"])).height >= 2 * len(invoices)

    await until(told)
    found = await log.written(INVOICES, ["A", "B"])
    causes = found["cause"].struct.unnest()
    assert causes["topic"].unique().to_list() == ["outbox.billing"]
    assert causes["origin"].struct.field("topic").str.starts_with("events.").all()
    states = found.group_by("invoice_id", maintain_order=True).agg("status", "total_minor")
    assert {row[0]: (row[1], row[2]) for row in states.iter_rows()} == {
        one["invoice_id"]: (["closed", "finalised"], [one["total_minor"]] * 2) for one in invoices
    }
    assert found["event_id"].n_unique() == found.height
    ends = {month: datetime(2013, int(month[5:]) + 1, 1, tzinfo=UTC) for month in MONTHS}
    assert all(row["occurred_at"] == ends[row["period"]] for row in found.to_dicts())


async def check_api(billing: Billing) -> None:
    anyone = await billing.api.get("/v1/invoices", headers={"Authorization": "Bearer no"})
    assert anyone.status_code == 401
    lost = await billing.api.get("/v1/invoices/none")
    assert (lost.status_code, lost.json()["type"]) == (404, "urn:causemesh:problem:not_found")
    for path in ("", "/verify"):
        lost = await billing.api.get(f"/v1/lines/A/2013-01/none/2013-01/tier1{path}")
        assert lost.status_code == 404
    assert (await billing.api.post("/v1/recount?period=2013-04")).status_code == 404
    assert (await billing.api.post("/v1/recount?period=2013-13")).status_code == 422
    assert (await billing.api.get("/v1/usage?cursor=e30=")).status_code == 422
    newest = await billing.pages("/invoices")
    refused = await billing.api.post(f"/v1/invoices/{newest[0]['invoice_id']}/retry")
    assert refused.status_code == 409
    order = [(one["period"], one["tenant_id"]) for one in newest]
    assert order == [(month, tenant) for month in reversed(MONTHS) for tenant in ("B", "A")]
    assert await billing.pages("/invoices", tenant_id="A") == newest[1::2]
    assert await billing.pages("/invoices", status="closed") == []
    line = await billing.get("/lines/A/2013-02/predictions/2013-01/tier2")
    assert (line["tenant_id"], line["usage_period"], line["currency"]) == ("A", JANUARY, "usd")
    assert line["filter"] == "outcome = 'predicted'"
    assert line["quantity"] == line["quantity_micro"] / 1e6 == 26.0
    fee = await billing.get("/lines/A/2013-01/base_fee/2013-01/tier0")
    assert (fee["topic"], fee["ranges"], fee["amount_minor"]) == (None, [], 4900)
    entries = await billing.pages("/ledger", tenant_id="A")
    assert sum(entry["amount_minor"] for entry in entries) == 0
    debits = [entry["amount_minor"] for entry in entries if entry["account"] == "receivable:A"]
    assert sum(debits) == sum(one["total_minor"] for one in newest[1::2])
    assert (await billing.get("/plans"))["plans"]["standard"]["base_fee"] == "49.00"
    await billing.told('billing_invoices{status="finalised"}', 6)
    total = sum(one["total_minor"] for one in newest)
    await billing.told('billing_invoiced_minor{currency="usd",status="finalised"}', total)
    await billing.told("billing_unbilled_buckets", 0)
    await check_usage(billing)


async def check_what_the_log_lost(cluster: Endpoints, log: Log, billing: Billing) -> None:
    """An old line whose first records retention took can't be proved; it isn't called wrong."""
    ends = await log.reader.ends([log.project.answers])
    admin = AIOKafkaAdminClient(bootstrap_servers=cluster.kafka_bootstrap)
    await admin.start()
    first = {KafkaPartition(*source): RecordsToDelete(1) for source in ends}
    await admin.delete_records(first)
    await admin.close()
    (invoice,) = await billing.pages("/invoices", tenant_id="A", period=JANUARY)
    lines = (await billing.get(f"/invoices/{invoice['invoice_id']}"))["lines"]
    answers = {}
    for line in lines:
        answer = await billing.api.get(f"/v1/lines/{line['line_id']}/verify")
        answers[line["meter"]] = (answer.status_code, answer.json().get("type"))
    gone = (410, "urn:causemesh:problem:log_gone")
    assert answers["predictions"] == gone
    assert answers["base_fee"] == (200, None)
    recount = await billing.api.post("/v1/recount", params={"period": JANUARY})
    assert (recount.status_code, recount.json()["type"]) == gone


async def check_usage(billing: Billing) -> None:
    """Hours by the API against the frames that were sent."""
    window = {"tenant_id": "B", "from": "2013-01-01T00:00:00Z", "to": "2013-01-02T00:00:00Z"}
    found = await billing.pages("/usage", **window)
    hours = {
        name: [(one["hour"][11:13], one["quantity"]) for one in found if one["meter"] == name]
        for name in ("predictions", "compute_ms", "sensors", "level")
    }
    made = answers("B", JANUARY, 5)["compute_ms"].round(6).to_list()
    assert hours["predictions"] == [("00", 1.0), ("05", 1.0), ("10", 1.0), ("20", 1.0)]
    assert hours["compute_ms"] == list(zip(("00", "05", "10", "15", "20"), made, strict=True))
    # Late readings have the same hours and sensors, and a value that is two higher.
    assert hours["sensors"] == [("00", 1.0), ("07", 1.0), ("14", 1.0), ("21", 1.0)]
    assert hours["level"] == [("00", 2.0), ("07", 39.0), ("14", 76.0), ("21", 12.0)]


# Pushing by itself: the stand-in runs in a thread, so that its keys can be ignored.


class HandClock(SystemClock):
    def __init__(self) -> None:
        self.now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s


class Blind:
    """Payments that never find what is there: the control arm of looking first."""

    def __init__(self, payments: Payments) -> None:
        self.items_of = payments.items_of
        self.make = payments.make
        self.finalise = payments.finalise

    async def customer_of(self, tenant: str) -> str | None:
        return None

    async def bills_of(self, customer: str) -> list[Bill]:
        return []


@contextmanager
def served(data: Path, *, idempotency: bool = True) -> Iterator[Stripe]:
    server = make_server(create_app(data, idempotency=idempotency, faults=True), 0)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the stand-in ended while starting"
        time.sleep(0.01)
    made = Stripe(f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}")
    try:
        yield made
    finally:
        made.api.close()
        server.should_exit = True
        thread.join()


def outcomes() -> CounterMetric:
    return CounterMetric("outcomes", "", ("kind", "outcome"), registry=CollectorRegistry())


@pytest.fixture
async def tables(database: AsyncEngine) -> AsyncEngine:
    async with database.begin() as connection:
        await connection.run_sync(metadata.create_all)
    return database


async def close(engine: AsyncEngine, period: str, tenants: Sequence[str]) -> None:
    """A month with one invoice of two lines for each tenant."""
    terms = Terms.read(MODEL)
    used_up = (UsageRow("predictions", period, 30 * 10**6, ()),)
    made = [(close_month(terms.config, name, period, used_up), used_up) for name in tenants]
    async with engine.begin() as transaction:
        await Books.open_month(transaction, period, terms)
        await Books.add(transaction, made)


class Push:
    """A pusher on a clock of the test's own."""

    def __init__(self, engine: AsyncEngine, payments: Payments) -> None:
        self._clock = HandClock()
        books = Books(engine)
        self.pusher = Pusher(
            engine, books, payments, clock=self._clock, every_s=1, outcomes=outcomes()
        )

    async def again(self) -> int:
        """Push once all waiting is over."""
        self._clock.now_s += 100
        return await self.pusher.push_due()


# The library hands httpx its form as `data=`, which httpx calls old.
pushing = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pushing
@pytest.mark.parametrize("keys", [True, False])
@pytest.mark.parametrize("looks", [True, False])
async def test_a_lost_answer_makes_no_double(
    tables: AsyncEngine, tmp_path: Path, *, keys: bool, looks: bool
) -> None:
    """Within a day the keys hold, after it what is found; the control has neither."""
    await close(tables, JANUARY, ["A"])
    with served(tmp_path / "data.db", idempotency=keys) as stripe:
        stripe.fault("timeout_after_commit", CUSTOMERS)
        stripe.fault("timeout_after_commit", DRAFTS)
        async with open_stripe("sk_test_unit", stripe.url) as payments:
            push = Push(tables, payments if looks else Blind(payments))
            assert [await push.again() for _ in range(3)] == [0, 0, 1]
        made = 1 if keys or looks else 2
        assert len(stripe.all("/v1/customers")) == len(stripe.all("/v1/invoices")) == made


@pushing
@pytest.mark.parametrize("changes_keys", [True, False])
async def test_a_kept_error_is_left_behind_by_the_next_key(
    tables: AsyncEngine, tmp_path: Path, *, changes_keys: bool
) -> None:
    await close(tables, JANUARY, ["A"])
    with served(tmp_path / "data.db") as stripe:
        for where in (CUSTOMERS, DRAFTS, ITEMS, FINALISE):
            stripe.fault(500, where)
        async with open_stripe("sk_test_unit", stripe.url) as payments:
            push = Push(tables, payments)
            pushed = 0
            for _ in range(5):
                pushed += await push.again()
                if not changes_keys:
                    async with tables.begin() as connection:
                        await connection.execute(sa.text("UPDATE customers SET attempt = 0"))
                        await connection.execute(sa.text("UPDATE invoices SET attempt = 0"))
        assert pushed == (1 if changes_keys else 0)
        (status,) = await rows(tables, "SELECT status, problem FROM invoices")
        assert status == ("finalised" if changes_keys else "closed", None)


@pushing
async def test_a_draft_that_somebody_changed_is_not_finalised(
    tables: AsyncEngine, tmp_path: Path
) -> None:
    await close(tables, JANUARY, ["A", "B"])
    with served(tmp_path / "data.db") as stripe:
        stripe.fault(500, FINALISE, count=2)
        async with open_stripe("sk_test_unit", stripe.url) as payments:
            push = Push(tables, payments)
            assert await push.again() == 0
            drafts = {
                one["metadata"]["causemesh_tenant"]: one for one in stripe.all("/v1/invoices")
            }
            more = {"customer": drafts["A"]["customer"], "invoice": drafts["A"]["id"]}
            added = stripe.api.post(
                "/v1/invoiceitems", data={**more, "amount": 1, "currency": "usd"}
            )
            assert added.status_code == 200
            assert [await push.again() for _ in range(2)] == [1, 0]
        found = dict(await rows(tables, "SELECT tenant_id, status FROM invoices"))
        assert found == {"A": "mismatch", "B": "finalised"}
        states = {one["id"]: one["status"] for one in stripe.all("/v1/invoices")}
        assert states == {drafts["A"]["id"]: "draft", drafts["B"]["id"]: "open"}
        # A person deletes the draft and has it made again.
        assert stripe.api.delete(f"/v1/invoices/{drafts['A']['id']}").status_code == 200
        books = Books(tables)
        asked = {head.tenant_id: await books.retry(head.invoice_id) for head in await both(books)}
        assert asked == {"A": True, "B": False}
        async with open_stripe("sk_test_unit", stripe.url) as payments:
            assert await Push(tables, payments).again() == 1
        assert [head.status for head in await both(books)] == ["finalised"] * 2
    told = await rows(tables, "SELECT record FROM outbox_rows")
    assert [json.loads(record)["tenant_id"] for (record,) in told] == ["B", "A"]


async def both(books: Books) -> list[Head]:
    return await books.of_month(JANUARY)


@pushing
async def test_one_instance_pushes_at_once(tables: AsyncEngine, tmp_path: Path) -> None:
    await close(tables, JANUARY, ["A", "B"])
    await close(tables, FEBRUARY, ["A", "B"])
    with served(tmp_path / "data.db") as stripe:
        async with open_stripe("sk_test_unit", stripe.url) as payments:
            push = Push(tables, payments)
            async with tables.begin() as other:
                assert await locked(other, PUSHER, None)
                assert await push.again() == 0
            assert await push.again() == 4
        assert len(stripe.all("/v1/invoices")) == 4


# Metering and closing by themselves.


class Memory:
    """A log in memory, and a worker of its one partition over a real database."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine
        self.catalogue = Catalogue.load([ROOT / "tests" / "project"], partitions=1)
        self.config = parse_billing(MODEL)
        self.bus = MemoryBus()
        self.registry = MemoryRegistry()
        self.topics = (PREDICTIONS, READINGS)
        for topic in (*self.topics, DEADLETTERS):
            self.bus.create(topic, 1)
        self.emitter = Emitter(
            self.catalogue,
            RegistryEncoders(self.registry),
            self.bus.producer("test"),
            [*self.topics, DEADLETTERS],
        )
        self._sent = 0

    async def send(self, frame: pl.DataFrame) -> None:
        topic = PREDICTIONS if "outcome" in frame.columns else READINGS
        (source,) = self.catalogue.source_partitions(topic)
        positions = np.arange(self._sent, self._sent + frame.height, dtype=np.int64)
        self._sent += frame.height
        keys = [text.encode() for text in frame["event_id"]]
        await self.emitter.send([Outgoing(topic, frame, keys, *source, positions)], {})

    async def promise(self, at_us: int) -> None:
        for topic in self.topics:
            (source,) = self.catalogue.source_partitions(topic)
            await self.emitter.send([], {(topic, *source): at_us})

    async def meter(self, max_records: int) -> list[tuple[Any, ...]]:
        """The buckets that a fresh database has when all is read, so many records a unit."""
        async with self.engine.begin() as connection:
            for table in ("usage_buckets", "usage_members", "tenants", "checkpoints"):
                await connection.execute(sa.text(f"DELETE FROM {table}"))
        stage = stage_of(self.catalogue, self.config)
        decoder = Decoder(self.registry)
        processor = Metering(
            stage,
            0,
            catalogue=self.catalogue,
            decoder=decoder,
            config=self.config,
            outcomes=outcomes(),
        )
        worker = PartitionWorker(
            stage,
            0,
            processor,
            bus=self.bus,
            store=SqlPositionStore(self.engine),
            catalogue=self.catalogue,
            decoder=decoder,
            emitter=self.emitter,
            clock=SystemClock(),
            limits=Limits(max_records=max_records, max_wait_s=0.01),
        )
        running = asyncio.create_task(worker.run())
        ends = {source: len(log.values) - 1 for source, log in self.bus.logs.items()}

        async def all_read() -> bool:
            return all(ends[source] == at for source, at in worker.positions.items())

        await until(all_read, 20)
        worker.stopping = True
        await running
        return await rows(self.engine, "SELECT * FROM usage_buckets ORDER BY 1, 2, 3, 4, 5, 6, 7")


PREDICTIONS, READINGS = "inference.predictions.v1", "events.reading"


def numbered(frame: pl.DataFrame, name: str) -> pl.DataFrame:
    return frame.with_columns(pl.col("event_id") + name)


async def late_log(memory: Memory) -> None:
    """Usage of each month before its end, after it, and after the end of the next one."""
    await memory.send(answers("A", JANUARY, 20))
    await memory.send(readings("A", JANUARY, 10))
    for month in (JANUARY, FEBRUARY):
        await memory.promise(over(month) - 1)
        await memory.send(numbered(answers("A", JANUARY, 6), f"-{month}-in-time"))
        await memory.promise(over(month))
        await memory.send(numbered(answers("A", JANUARY, 3), f"-{month}-late"))
        await memory.send(numbered(readings("B", month, 9), f"-{month}-late"))
        await memory.send(answers("A", {JANUARY: FEBRUARY, FEBRUARY: MARCH}[month], 15))


async def test_what_is_due_does_not_depend_on_batches(
    tables: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = Memory(tables)
    await late_log(memory)
    runs = [await memory.meter(max_records) for max_records in (1, 7, 1_000)]
    assert runs[0] == runs[1] == runs[2]
    counted = await rows(
        tables,
        "SELECT usage_period, due_period, CAST(sum(quantity_micro) / 1000000 AS int)"
        " FROM usage_buckets WHERE meter = 'predictions' GROUP BY 1, 2 ORDER BY 1, 2",
    )
    assert counted == [
        (JANUARY, JANUARY, 17 + 5),
        (JANUARY, FEBRUARY, 3 + 5),  # after January's end, and up to February's
        (JANUARY, MARCH, 3),
        (FEBRUARY, FEBRUARY, 13),
        (MARCH, MARCH, 13),
    ]

    # The control: by the batch's watermark, as `process` is told it, what is due depends on it.
    by_record = Promises.in_force

    async def by_batch(self: Promises, batch: Batch, *given: Any) -> Any:
        in_force = await by_record(self, batch, *given)
        newest = self._tracker.of_input((batch.topic, batch.partition))
        return np.full_like(in_force, newest)

    monkeypatch.setattr(Promises, "in_force", by_batch)
    assert await memory.meter(1_000) != await memory.meter(1)


async def test_poison_costs_its_own_record_only(tables: AsyncEngine) -> None:
    memory = Memory(tables)
    await late_log(memory)
    before = await memory.meter(1_000)
    bad = numbered(answers("A", JANUARY, 4), "-bad").with_columns(
        compute_ms=pl.Series([1.0, float("nan"), 2.0, -1.0])
    )
    await memory.send(pl.concat([numbered(answers("A", MARCH, 3), "-good"), bad]))
    after = await memory.meter(1_000)
    assert after != before
    letters = memory.bus.log(DEADLETTERS, 0)
    decoded = await Decoder(memory.registry).decode(
        letters.values, memory.catalogue.topic(DEADLETTERS).record
    )
    keys = sorted(key.decode() for key in decoded.frame["original_key"])
    assert keys == [f"A-{JANUARY}-0-{n}-bad" for n in (1, 3)]
    last = "SELECT CAST(sum(quantity_micro) / 1000000 AS int) FROM usage_buckets WHERE"
    total = await rows(tables, f"{last} meter = 'predictions' AND due_period = '{MARCH}'")
    assert total == [(3 + 13 + 3 + 2,)]


class Closing:
    """A closer over a database, and the group's watermark in it."""

    def __init__(self, engine: AsyncEngine, document: Mapping[str, Any] = MODEL) -> None:
        self._engine = engine
        self.closer = MonthCloser(
            engine,
            SqlPositionStore(engine),
            Terms.read(document),
            partitions=2,
            clock=SystemClock(),
            every_s=1,
            outcomes=outcomes(),
        )

    async def at(self, *watermarks_us: int) -> int:
        async with self._engine.begin() as connection:
            await connection.execute(sa.text("DELETE FROM checkpoints"))
            for number, at_us in enumerate(watermarks_us):
                await connection.execute(
                    sa.text(
                        "INSERT INTO checkpoints (group_name, partition, epoch, watermark_us)"
                        f" VALUES ('billing', {number}, 1, {at_us})"
                    )
                )
        return await self.closer.close_due()


async def test_months_close_in_order_once_all_partitions_are_past(tables: AsyncEngine) -> None:
    memory = Memory(tables)
    await late_log(memory)
    await memory.meter(1_000)
    closing = Closing(tables)
    assert await closing.at() == 0
    assert await closing.at(over(MARCH)) == 0
    assert await closing.at(over(MARCH), over(JANUARY) - 1) == 0
    assert await closing.at(over(MARCH), over(JANUARY)) == 1
    async with tables.begin() as other:
        assert await locked(other, CLOSER, None)
        assert await closing.at(over(MARCH), over(MARCH)) == 0
    assert await closing.at(over(MARCH), over(MARCH)) == 2
    assert await closing.at(over(MARCH), over(MARCH)) == 0
    invoices = await rows(tables, "SELECT period, tenant_id FROM invoices ORDER BY 1, 2")
    assert invoices == [
        (JANUARY, "A"), (FEBRUARY, "A"), (FEBRUARY, "B"), (MARCH, "A"), (MARCH, "B")
    ]  # fmt: skip
    told = await rows(tables, "SELECT record FROM outbox_rows WHERE shard = 1024 ORDER BY 1")
    assert len(told) == len(invoices)
    fees = await rows(tables, "SELECT usage_period FROM lines WHERE meter = 'base_fee' ORDER BY 1")
    assert fees == [(JANUARY,), (JANUARY,), (FEBRUARY,), (FEBRUARY,), (MARCH,)]


async def test_closed_months_get_no_more_usage_when_the_grace_is_made_longer(
    tables: AsyncEngine,
) -> None:
    memory = Memory(tables)
    await memory.send(answers("A", JANUARY, 5))
    await memory.meter(1_000)
    assert await Closing(tables).at(over(JANUARY), over(JANUARY)) == 1
    assert {row[6] for row in await memory.meter(1_000)} == {FEBRUARY}
    # The control: without the closed month in sight the same records are January's.
    async with tables.begin() as connection:
        for table in ("ledger", "lines", "invoices", "billed", "closed_usage", "closed_months"):
            await connection.execute(sa.text(f"DELETE FROM {table}"))
    assert {row[6] for row in await memory.meter(1_000)} == {JANUARY}


async def test_a_named_tenant_pays_its_fee_in_a_month_without_usage(tables: AsyncEngine) -> None:
    memory = Memory(tables)
    await memory.send(answers("A", JANUARY, 5))
    await memory.send(answers("A", MARCH, 5))
    await memory.meter(1_000)
    named = {**MODEL, "tenants": {"default": "standard", "N": "standard"}}
    assert await Closing(tables, named).at(over(MARCH), over(MARCH)) == 3
    invoices = await rows(
        tables, "SELECT period, tenant_id, total_minor FROM invoices WHERE tenant_id = 'N'"
    )
    assert sorted(invoices) == [(month, "N", 4900) for month in MONTHS]
    february = "SELECT tenant_id FROM invoices WHERE period = '2013-02'"
    assert await rows(tables, february) == [("N",)]


async def test_another_plan_is_told_once(tables: AsyncEngine) -> None:
    async with tables.begin() as transaction:
        await UsageStore.meet(transaction, {"A": "standard", "B": "old"})
    for _ in range(2):
        await announce_changes(tables, parse_billing(MODEL), SystemClock())
    told = [
        json.loads(record) for (record,) in await rows(tables, "SELECT record FROM outbox_rows")
    ]
    assert [(one["tenant_id"], one["plan"], one["sequence"]) for one in told] == [
        ("B", "standard", 2)
    ]


def test_a_topic_without_watermarks_is_no_meter() -> None:
    catalogue = Catalogue.load([ROOT / "tests" / "project"])
    for topic in ("agents.runs.v1", "billing.entitlements.v1"):
        meters = {"calls": {"topic": topic, "aggregation": "count"}}
        plans = {"standard": {"base_fee": "1"}}
        config = parse_billing({**MODEL, "meters": meters, "plans": plans})
        with pytest.raises(Misdeclared, match=f"{topic} can't be metered"):
            stage_of(catalogue, config)


def test_real_stripe_needs_a_key_of_ones_own() -> None:
    with pytest.raises(Misdeclared, match="CAUSEMESH_STRIPE_KEY"):
        BillingSettings(stripe_url=None).payments_key()
    assert BillingSettings(stripe_url="http://127.0.0.1:1").payments_key() == "sk_test_local"
