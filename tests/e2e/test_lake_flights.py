"""Flights through ingest and features into the lake: its tables hold what the topics hold."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from causemesh.cli.context import connections
from causemesh.cli.running import processes, settings_on
from causemesh.client import connect
from causemesh.errors import Misdeclared
from causemesh.lake.definitions import define_lake
from causemesh.local import Cluster
from causemesh.local.mesh import Mesh
from causemesh.provision import provision
from examples.flights.dataset import load, slices, with_defects

pytestmark = [pytest.mark.servers, pytest.mark.timeout(600)]
HOME = Path(".causemesh-test-e2e")
PROJECT = Path("examples/flights")
SERVERS = ("kafka", "registry", "postgres")
FILLED = ("flight_departed", "flight_landed", "weather_observed")
DAYS = 2


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    """Ingest, features and the lake over an empty log, with two days of flights replayed."""
    cluster = Cluster(HOME, SERVERS)
    cluster.down()
    for name in ("kafka", "registry", "postgres", "lake"):
        shutil.rmtree(HOME / name, ignore_errors=True)
    (HOME / "demo").touch()  # the demo's tests may empty it again
    endpoints = cluster.up()
    asyncio.run(provision(settings_on(endpoints, PROJECT, "kafka", 2)))
    made = Mesh(HOME, endpoints, PROJECT, ["ingest", "features", "lake"])
    made.extra = {"CAUSEMESH_PARTITIONS": "2", "CAUSEMESH_LAKE_COMMIT_SECONDS": "2"}
    try:
        made.up()
        asyncio.run(_replay())
        yield made
    finally:
        made.down()
        cluster.down()


async def _replay() -> None:
    replay = load(1, DAYS)
    departed, _ = with_defects(replay.departed)  # some come twice, some without a tenant
    replay = replace(replay, departed=departed)
    async with connections(HOME) as open_to, connect(settings=open_to.settings) as client:
        for until_us, frames in slices(replay):
            for kind, frame in frames.items():
                if kind == "requests" and frame.height:
                    await client.request(frame)
                elif frame.height:
                    await client.produce(kind, frame)
            for kind in frames:
                await client.watermark(kind, until_us)


def lake(*words: str) -> Any:
    """What `causemesh lake ... --json` prints."""
    argv = [
        Path(sys.executable).with_name("causemesh"),
        "lake",
        *words,
        "--home",
        str(HOME),
        "--json",
    ]
    done = subprocess.run(argv, check=False, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


async def _logged() -> dict[str, int]:
    """By the table of each topic: how many records the topic holds, replays left out."""
    counts: dict[str, int] = {}
    async with connections(HOME) as mesh:
        definition = define_lake(mesh.catalogue, PROJECT)
        for topic in definition.topics:
            main = definition.of_topic(topic)[-1]
            counts[main.identifier] = 0
            async for batch in mesh.log.read(await mesh.log.ends([topic])):
                bad = len(batch.bad) if main.zone == "raw" else 0
                counts[main.identifier] += len(batch) + bad
    return {table: count for table, count in counts.items() if count}


def counted(tables: list[str]) -> dict[str, int]:
    union = " UNION ALL ".join(
        f"SELECT '{one}' AS name, count(*) AS n FROM {one}" for one in tables
    )
    return {row["name"]: row["n"] for row in lake("sql", union)}


def settled(logged: dict[str, int]) -> dict[str, int]:
    """The lake's counts once they are the log's, or after a while."""
    deadline = time.monotonic() + 90
    found: dict[str, int] = {}
    while found != logged and time.monotonic() < deadline:
        there = {row["table"] for row in lake("tables")}
        if set(logged) <= there:
            found = counted(sorted(logged))
        time.sleep(1)
    return found


def test_counts_by_sql_are_those_of_the_topics(mesh: Mesh) -> None:
    logged: dict[str, int] = {}
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:  # the services are still at work
        before, logged = logged, asyncio.run(_logged())
        if before == logged and all(f"decoded.events_{kind}" in logged for kind in FILLED):
            break
        time.sleep(2)
    assert {f"raw.inbox_{kind}" for kind in (*FILLED, "requests")} <= set(logged)
    assert logged["decoded.inference_requests_v1"] > 1_000
    assert settled(logged) == logged


def test_a_curated_table_and_a_day_of_a_tenant(mesh: Mesh) -> None:
    rows = lake(
        "sql",
        "SELECT count(*) AS n, sum(late::int) AS late FROM curated.landings"
        " WHERE tenant_id = 'UA' AND occurred_at >= TIMESTAMPTZ '2013-01-02 00:00:00+00'"
        " AND occurred_at < TIMESTAMPTZ '2013-01-03 00:00:00+00'",
    )
    landed = load(1, DAYS).landed.filter(tenant_id="UA")
    day = landed.filter(landed["occurred_at"].dt.day() == 2)
    assert rows == [{"n": day.height, "late": int((day["arrival_delay_minutes"] >= 15).sum())}]


def test_compaction_changes_no_count(mesh: Mesh) -> None:
    before = counted(["decoded.events_flight_landed"])
    (done,) = lake("compact", "flight_landed", "--files", "2")
    assert done["files_before"] >= done["files_after"]
    assert counted(["decoded.events_flight_landed"]) == before
    (expired,) = lake("expire", "flight_landed", "--snapshot-days", "0", "--keep", "1")
    assert expired["snapshots"] > 0
    assert len(lake("snapshots", "flight_landed")) == 1
    assert counted(["decoded.events_flight_landed"]) == before


def test_the_writer_is_run_where_a_project_declares_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "lake" in processes(PROJECT)
    assert "lake" not in processes(Path("tests/project"))
    monkeypatch.setenv("CAUSEMESH_LAKE", "off")
    assert "lake" not in processes(PROJECT)
    monkeypatch.setenv("CAUSEMESH_LAKE", "maybe")
    with pytest.raises(Misdeclared, match="on or off"):
        processes(PROJECT)
