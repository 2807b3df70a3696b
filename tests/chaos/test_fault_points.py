"""A process killed at every declared step of the protocol, on real Kafka and Postgres."""

from __future__ import annotations

import asyncio
import signal
import time
import uuid
from asyncio.subprocess import Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import polars as pl
import psutil
import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine

from causemesh.bus.base import Outbound
from causemesh.bus.kafka import KafkaBus
from causemesh.codec.encode import RegistryEncoders
from causemesh.codec.registry import HttpRegistry
from causemesh.faultpoints import Point
from tests.chaos.pipeline import PARTITIONS, Plan, session_name
from tests.children import child

pytestmark = pytest.mark.servers
COUNT = 120
KIT_POINTS = [point for point in Point if point.split(".")[0] in ("worker", "outbox")]
IDS = sorted(f"r{n}" for n in range(COUNT))


@pytest.fixture
async def plan(kafka_bootstrap: str, registry_url: str, database: AsyncEngine) -> Plan:
    """Topics with requests in the inbox, and tables for what comes of them."""
    url = database.url.render_as_string(hide_password=False)
    made = Plan(kafka_bootstrap, registry_url, url, uuid.uuid4().hex)
    async with database.begin() as connection:
        for table in ("effects", "audits"):
            await connection.execute(sa.text(f"CREATE TABLE {table} (event_id text)"))
    bus, registry = KafkaBus(kafka_bootstrap), HttpRegistry(registry_url)
    catalogue = made.catalogue()
    admin = bus.admin()
    await admin.ensure([catalogue.topic(n) for n in (made.inbox, made.facts, made.audits)])
    await admin.close()
    await _produce(bus, registry, made)
    await registry.close()
    await bus.close()
    return made


async def _produce(bus: KafkaBus, registry: HttpRegistry, plan: Plan) -> None:
    inbox = plan.catalogue().topic(plan.inbox)
    encoder = await RegistryEncoders(registry).encoder(inbox.subject, inbox.record)
    frame = pl.DataFrame(
        {
            "event_id": [f"r{n}" for n in range(COUNT)],
            "tenant_id": ["t"] * COUNT,
            "occurred_at": pl.Series(range(COUNT)).cast(pl.Datetime("us", "UTC")),
            "model": ["m"] * COUNT,
            "version": pl.Series([None] * COUNT, dtype=pl.Int32),
            "entities": [[{"name": "tail", "value": "N1"}]] * COUNT,
            "inputs": [[{"name": "hour", "value": 1.0}]] * COUNT,
            "mode": ["live"] * COUNT,
            "expires_at": pl.Series([None] * COUNT, dtype=pl.Datetime("us", "UTC")),
        }
    )
    values = encoder.encode(frame)
    producer = bus.producer("outside")
    await producer.send(
        [Outbound(plan.inbox, n % PARTITIONS, [b"k%d" % n], [values[n]]) for n in range(COUNT)]
    )
    await producer.close()


process = partial(child, "tests.chaos.pipeline")


async def results(database: AsyncEngine) -> dict[str, list[str]]:
    """The ids in each table, repeats included."""
    found = {}
    async with database.connect() as connection:
        for table in ("effects", "audits"):
            rows = await connection.execute(sa.text(f"SELECT event_id FROM {table}"))
            found[table] = sorted(row[0] for row in rows)
    return found


async def everything(database: AsyncEngine) -> dict[str, list[str]]:
    """The results once every id came through, and then nothing new for a while."""
    last: dict[str, list[str]] = {}
    async with asyncio.timeout(90):
        while True:
            found = await results(database)
            if found == last and all(set(ids) == set(IDS) for ids in found.values()):
                return found
            last = found
            await asyncio.sleep(1.0)


async def killed_at(point: Point, plan: Plan, database: AsyncEngine, log: Path) -> float:
    """Kill at a point, start again unarmed; seconds from the kill to the first new result."""
    count = 1 if point.startswith("outbox") else 2  # one drain may take all
    async with process(plan, log, f"{point}:kill:{count}") as child:
        async with asyncio.timeout(60):
            status = await child.wait()
        assert status == -signal.SIGKILL, f"see {log}"
    before, began = await results(database), time.monotonic()
    async with process(plan, log):
        async with asyncio.timeout(60):
            while await results(database) == before:  # noqa: ASYNC110 - polls a database
                await asyncio.sleep(0.05)
        recovery_s = time.monotonic() - began
        await everything(database)
    return recovery_s


@pytest.mark.parametrize("point", KIT_POINTS)
async def test_a_kill_at_any_step_loses_and_doubles_nothing(
    point: Point, plan: Plan, database: AsyncEngine, tmp_path: Path
) -> None:
    recovery_s = await killed_at(point, plan, database, tmp_path / "log")
    print(f"{point}: back to work {recovery_s:.1f} s after the kill")
    assert await results(database) == {"effects": IDS, "audits": IDS}


@pytest.mark.parametrize("point", [Point.WORKER_SENT, Point.OUTBOX_SENT])
async def test_control_without_marks_the_same_kill_doubles(
    point: Point, plan: Plan, database: AsyncEngine, tmp_path: Path
) -> None:
    """With the readers' high-water marks off, what was sent before the kill counts twice."""
    await killed_at(point, replace(plan, deduplicate=False), database, tmp_path / "log")
    found = await results(database)
    assert len(found["audits"]) > COUNT
    assert set(found["audits"]) == set(IDS)


async def _stands_before_rows(plan: Plan, database: AsyncEngine, pid: int) -> bool:
    """Whether a process has claimed all of the sink and waits, in a unit of it, for a row that
    another's open transaction holds. One of its workers may have nothing left to do."""
    asked = sa.text(
        "SELECT (SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
        " AND application_name = :name AND wait_event_type = 'Lock'"
        " AND query LIKE '%outbox_heads%'),"
        " (SELECT count(*) FROM checkpoints WHERE group_name = :sink AND epoch > 1)"
    )
    told = {"name": session_name(pid), "sink": f"sink-{plan.name}"}
    async with database.connect() as connection:
        waits, claims = (await connection.execute(asked, told)).one()
    return waits > 0 and claims == PARTITIONS


async def stands_before_rows(plan: Plan, database: AsyncEngine, pid: int) -> None:
    """Until it does."""
    async with asyncio.timeout(60):
        while not await _stands_before_rows(plan, database, pid):  # noqa: ASYNC110 - polls
            await asyncio.sleep(0.05)


@asynccontextmanager
async def paused_in_a_unit(plan: Plan, log: Path) -> AsyncIterator[Process]:
    """A process that has stopped in the middle of a unit of the sink, its transaction open."""
    async with process(replace(plan, pause_at=2), log) as paused:
        state = psutil.Process(paused.pid)
        async with asyncio.timeout(60):
            while state.status() != psutil.STATUS_STOPPED:  # noqa: ASYNC110 - polls a process
                await asyncio.sleep(0.05)
        yield paused


async def replaced_while_paused(plan: Plan, database: AsyncEngine, tmp_path: Path) -> str:
    """A process stops in the middle of a unit of the sink, another one takes over and comes to the
    same records, then the first goes on; its log."""
    log = tmp_path / "paused.log"
    following_log = tmp_path / "next.log"
    async with paused_in_a_unit(plan, log) as paused, process(plan, following_log) as following:
        await stands_before_rows(plan, database, following.pid)
        paused.send_signal(signal.SIGCONT)
        await everything(database)
        await asyncio.sleep(1.0)  # for what the first still has to say
    return log.read_text()


async def test_a_replaced_process_that_goes_on_commits_nothing(
    plan: Plan, database: AsyncEngine, tmp_path: Path
) -> None:
    """Paused past its session timeout with a unit open, it finds its claim gone."""
    log = await replaced_while_paused(plan, database, tmp_path)
    assert "worker_fenced" in log
    assert await results(database) == {"effects": IDS, "audits": IDS}


async def test_control_without_the_fence_the_same_pause_doubles(
    plan: Plan, database: AsyncEngine, tmp_path: Path
) -> None:
    """Without the epoch in the commit both processes' effects stay."""
    log = await replaced_while_paused(replace(plan, fenced=False), database, tmp_path)
    assert "worker_fenced" not in log
    found = await results(database)
    assert len(found["effects"]) > COUNT
    assert set(found["effects"]) == set(IDS)


async def test_a_frozen_process_does_not_hold_up_the_next_one(
    plan: Plan, database: AsyncEngine, tmp_path: Path
) -> None:
    """The server ends the transaction that it stopped in. When it goes on nothing is doubled."""
    limited, log = replace(plan, idle_ms=3_000), tmp_path / "paused.log"
    async with paused_in_a_unit(limited, log) as paused, process(limited, tmp_path / "next.log"):
        await everything(database)
        assert psutil.Process(paused.pid).status() == psutil.STATUS_STOPPED
        paused.send_signal(signal.SIGCONT)
        await asyncio.sleep(3.0)  # for what it still does
    assert await results(database) == {"effects": IDS, "audits": IDS}


async def test_control_without_the_limit_the_next_one_waits(
    plan: Plan, database: AsyncEngine, tmp_path: Path
) -> None:
    """The open transaction's locks stay for as long as the process does."""
    log, following_log = tmp_path / "paused.log", tmp_path / "next.log"
    async with paused_in_a_unit(plan, log), process(plan, following_log) as following:
        await stands_before_rows(plan, database, following.pid)
        await asyncio.sleep(10.0)  # three times the other test's limit
        assert await _stands_before_rows(plan, database, following.pid)
        assert set((await results(database))["effects"]) < set(IDS)
