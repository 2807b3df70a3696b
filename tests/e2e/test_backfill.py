"""A second version of every view is added to a mesh at work: killed at each step of computing its
past, while events go on; then its answers are those over all events, bit for bit."""

from __future__ import annotations

import asyncio
import random
import shutil
import signal
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import psutil
import pytest
import yaml

from causemesh.bus.base import Outbound
from causemesh.cli.context import Connections, connections
from causemesh.cli.running import settings_on
from causemesh.client import Client, connect
from causemesh.codec.rows import RowEncoder
from causemesh.faultpoints import Point
from causemesh.lake.reading import Lake
from causemesh.lake.settings import lake_settings
from causemesh.local import Cluster
from causemesh.local.mesh import Mesh
from causemesh.local.process import ServerProcess
from causemesh.provision import provision
from services.features.domain.parsing import parse_views
from tests.unit.features.reference import Event, expected

pytestmark = [pytest.mark.servers, pytest.mark.timeout(600)]
HOME = Path(".causemesh-test-e2e")
SOURCE = Path("tests/project")
SERVERS = ("kafka", "registry", "postgres")
PARTITIONS = 2
EVENTS, TASKS, VERSIONS = "events.reading", "inference.tasks.realtime.v1", "models.versions.v1"
SENSORS, SITES = [f"s{n}" for n in range(12)], [f"site{n}" for n in range(5)]
TENANT = "t"
FIRST: dict[str, Any] = yaml.safe_load((SOURCE / "features.yaml").read_text())["views"]
SECOND: dict[str, Any] = {
    "sensor_readings@v2": {
        **FIRST["sensor_readings"],
        "entities": 1_000,
        "features": {"*": ["count 6h", "age"], "value": ["sum 6h", "std 6h", "latest", "last 6h"]},
    },
    "site_readings@v2": {
        **FIRST["site_readings"],
        "entities": 1_000,
        "features": {"*": ["count 6h"], "value": ["min 6h", "max 6h", "distinct 6h", "p50 6h"]},
    },
    "own_readings@v2": {
        **FIRST["sensor_readings"],
        "entities": 1_000,
        "placement": "partitioned",
        "features": {"*": ["count 6h"], "value": ["mean 6h", "first 6h"]},
    },
}
VIEWS = parse_views({"views": SECOND})
POINTS = (Point.BACKFILL_READ, Point.BACKFILL_COMPUTED, Point.BACKFILL_MERGED)


class World:
    """The mesh, with features run by the test itself, so that it can be ended at a step."""

    def __init__(self, mesh: Mesh, project: Path) -> None:
        self.mesh = mesh
        self.project = project
        self.random = random.Random(1)
        self.count = 0

    def declare(self, *views: Mapping[str, Any]) -> None:
        merged = {name: body for some in views for name, body in some.items()}
        (self.project / "features.yaml").write_text(yaml.safe_dump({"views": merged}))

    def features(self, **more: str) -> ServerProcess:
        process = self.mesh.process("features")
        process = replace(process, environment={**process.environment, **more})
        process.start([sys.executable, "-m", "services.features.app"])
        return process

    def readings(self, count: int, spread_s: float) -> list[dict[str, Any]]:
        """Readings of the last `spread_s` seconds, in no order."""
        now, rows = datetime.now(UTC), []
        for _ in range(count):
            self.count += 1
            rows.append(
                {
                    "event_id": f"e{self.count}",
                    "tenant_id": TENANT,
                    "occurred_at": now - timedelta(seconds=self.random.random() * spread_s),
                    "sensor": self.random.choice(SENSORS),
                    "site": self.random.choice([*SITES, None]),
                    "value": self.random.choice([None, round(self.random.gauss(0, 50), 3)]),
                }
            )
        return rows

    def views(self) -> dict[str, dict[str, Any]]:
        """/v1/views by view; empty while nobody answers, or partitions are missing."""
        try:
            with self.mesh.client("features") as client:
                if client.get("/ready").status_code != 200:
                    return {}
                return {one["view"]: one for one in client.get("/v1/views").json()}
        except Exception:  # noqa: BLE001 - the process is starting, or was ended
            return {}


async def until(condition: Callable[[], Any], timeout_s: float = 90.0) -> Any:
    """The first true answer; blocking conditions run in a thread."""
    deadline = time.monotonic() + timeout_s
    while not (answer := await asyncio.to_thread(condition)):
        assert time.monotonic() < deadline, f"waited {timeout_s} s"
        await asyncio.sleep(0.2)
    return answer


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Ingest and the lake's writer over an empty log."""
    project = tmp_path_factory.mktemp("project") / "project"
    shutil.copytree(SOURCE, project)
    (project / "lake.yaml").write_text("")
    cluster = Cluster(HOME, SERVERS)
    cluster.down()
    for name in ("kafka", "registry", "postgres", "lake"):
        shutil.rmtree(HOME / name, ignore_errors=True)
    (HOME / "demo").touch()  # the demo's tests may empty it again
    endpoints = cluster.up()
    asyncio.run(provision(settings_on(endpoints, project, "kafka", PARTITIONS)))
    # what reaches the other services goes by the mesh's list: features is the test's own
    every = Mesh(HOME, endpoints, project, ["ingest", "lake", "features"])
    mesh = Mesh(HOME, endpoints, project, ["ingest", "lake"])
    mesh.extra = every.extra = {
        "CAUSEMESH_PARTITIONS": str(PARTITIONS),
        "CAUSEMESH_LAKE_COMMIT_SECONDS": "1",
        "CAUSEMESH_SLICE_SECONDS": "1",
        "CAUSEMESH_COMMIT_EVERY_UNITS": "1",
        "CAUSEMESH_COMMIT_EVERY_S": "0.1",
    }
    made = World(every, project)
    try:
        mesh.up()
        yield made
    finally:
        every.process("features").stop(how=signal.SIGKILL)
        mesh.down()
        cluster.down()


@asynccontextmanager
async def opened(world: World) -> AsyncIterator[tuple[Connections, Client]]:
    async with connections(HOME) as open_to, connect(settings=open_to.settings) as client:
        yield open_to, client


async def register(to: Connections, model: str, sequence: int, features: Sequence[str]) -> None:
    """As inference does, without an artefact: nobody serves these."""
    topic = to.catalogue.topic(VERSIONS)
    schema_id = await to.registry.register(topic.subject, topic.record)
    now = datetime.now(UTC)
    row = {
        "event_id": str(uuid.uuid4()),
        "tenant_id": "-",
        "occurred_at": now,
        "cause": {"topic": "outbox", "partition": 0, "position": sequence, "index": 0},
        "model": model,
        "version": 1,
        "lane": "realtime",
        "features": [*features],
        "required": [],
        "artefact_sha256": "0" * 64,
        "reference": [],
        "metrics": [],
        "sequence": sequence,
    }
    value = RowEncoder(topic.record, schema_id).encode(row)
    producer = to.bus.producer("test")
    await producer.send([Outbound(VERSIONS, 0, [model.encode()], [value])])
    await producer.close()


async def rows_of(to: Connections, topic: str) -> pl.DataFrame:
    frames = [
        batch.frame.with_columns(
            pl.Series("partition", [batch.partition] * len(batch)),
            pl.Series("position", batch.positions),
        )
        async for batch in to.log.read(await to.log.ends([topic]))
    ]
    return pl.concat(frames) if frames else pl.DataFrame({"request_id": []})


async def ask(
    to: Connections, client: Client, model: str, whom: Sequence[tuple[str, str]]
) -> list[dict[str, Any]]:
    """The tasks of one request for each (sensor, site)."""
    ids = [str(uuid.uuid4()) for _ in whom]
    requests = [
        {
            "event_id": name,
            "tenant_id": TENANT,
            "occurred_at": datetime.now(UTC),
            "model": model,
            "version": 1,
            "inputs": [],
            "entities": [{"name": "sensor", "value": sensor}, {"name": "site", "value": site}],
        }
        for name, (sensor, site) in zip(ids, whom, strict=True)
    ]
    await client.request(requests)
    deadline = time.monotonic() + 60
    while True:
        found = (await rows_of(to, TASKS)).to_dicts()
        tasks = {row["request_id"]: row for row in found if row["request_id"] in ids}
        if len(tasks) == len(ids):
            return [tasks[name] for name in ids]
        assert time.monotonic() < deadline, f"{len(tasks)} of {len(ids)} tasks came"
        await asyncio.sleep(0.3)


def lake_holds(world: World, to: Connections, count: int) -> bool:
    with Lake.open(lake_settings(world.mesh.environment()), to.catalogue, world.project) as lake:
        there = {definition.topic for definition, _ in lake.tables()}
        return EVENTS in there and lake.select(EVENTS).count() >= count


def reference(events: pl.DataFrame, task: Mapping[str, Any], sensor: str, site: str) -> bytes:
    """The vector, one pass over a plain list of events for each feature."""
    as_of_us = round(task["features_as_of"].timestamp() * 1e6)
    vector: list[np.float32] = []
    for view in VIEWS:
        key, whom = ("sensor", sensor) if view.entity == ("sensor",) else ("site", site)
        kept = [
            Event(row[key], round(row["occurred_at"].timestamp() * 1e6), row["partition"],
                  row["position"], tuple(row["value"] for _ in view.columns))
            for row in events.to_dicts()
        ]  # fmt: skip
        vector += expected(view, kept, whom, as_of_us)
    return np.array(vector, "<f4").tobytes()


async def test_a_new_version_of_views_takes_its_past_from_the_lake(world: World) -> None:
    old = [f"{name}.count_1h" for name in ("sensor_readings",)]
    new = [f"{view.id}.{feature.name}" for view in VIEWS for feature in view.features]
    async with opened(world) as (to, client):
        # the first version at work, all of its events in the lake
        world.declare(FIRST)
        process = world.features()
        await until(world.views)
        await register(to, "old", 1, old)
        await client.produce("reading", world.readings(2_000, 5 * 3_600))
        await until(lambda: lake_holds(world, to, 2_000))
        (task,) = await ask(to, client, "old", [(SENSORS[0], SITES[0])])
        assert task["failure"] is None
        process.stop(how=signal.SIGKILL)

        # the second is declared; from here on events come all the time, also while nobody reads
        world.declare(FIRST, SECOND)
        stop = asyncio.Event()
        flowing = asyncio.create_task(flow(world, client, stop))
        await asyncio.sleep(1.0)
        await ended_at(world, Point.BACKFILL_PLACED)

        # without its lake the mesh serves what it can, and says what it waits for
        away = {"CAUSEMESH_LAKE_CATALOG": "postgresql+pg8000://nobody@127.0.0.1:1/lake"}
        process = world.features(**away)
        await register(to, "new", 2, new)
        await until(lambda: waits(world))
        seen = world.views()
        assert seen["sensor_readings@v1"]["state"] == "offered"
        assert all(seen[view.id]["state"] == "backfilling" for view in VIEWS)
        assert seen["own_readings@v2"]["cuts"]
        (refused,) = await ask(to, client, "new", [(SENSORS[0], SITES[0])])
        assert refused["failure"].startswith("view_backfilling: view ")
        assert "is being computed from past events" in refused["failure"]
        (task,) = await ask(to, client, "old", [(SENSORS[1], SITES[1])])
        assert task["failure"] is None
        path = f"/v1/views/sensor_readings@v2/entities/{SENSORS[0]}?tenant_id={TENANT}"
        with world.mesh.client("features") as api:
            assert api.get(path).json()["type"] == "urn:causemesh:problem:view_backfilling"
        process.stop(how=signal.SIGKILL)

        for point in POINTS:
            await ended_at(world, point)
        process = world.features()
        await until(lambda: offered(world))
        stop.set()
        await flowing

        # once all that came was applied: what it answers is what a plain pass over the log says
        whom = [(sensor, SITES[n % len(SITES)]) for n, sensor in enumerate(SENSORS)]
        await settled(world, to)
        tasks = await ask(to, client, "new", whom)
        assert [task["failure"] for task in tasks] == [None] * len(whom)
        events = await rows_of(to, EVENTS)
        assert events.height == world.count
        assert [task["vector"] for task in tasks] == [
            reference(events, task, *one) for task, one in zip(tasks, whom, strict=True)
        ]

        # after its commit it is not computed again
        process.stop(how=signal.SIGKILL)
        lines = process.log.read_text().count("backfill_begins")
        world.features(**away)
        await until(lambda: offered(world))
        assert process.log.read_text().count("backfill_begins") == lines


async def flow(world: World, client: Client, stop: asyncio.Event) -> None:
    """A few readings ten times a second, some of them late."""
    while not stop.is_set():
        await client.produce("reading", world.readings(4, 1.0) + world.readings(1, 3_600))
        await asyncio.sleep(0.1)


async def ended_at(world: World, point: Point) -> None:
    """Run features until it ends itself at a step."""
    process = world.features(CAUSEMESH_FAULT=f"{point}:kill")
    running = process.running()
    assert running is not None

    def over() -> bool:
        return not running.is_running() or running.status() == psutil.STATUS_ZOMBIE

    await until(over)
    assert running.wait(1) in (-signal.SIGKILL, None), process.tail()


def waits(world: World) -> bool:
    seen = world.views()
    return bool(seen) and all("away" in (seen[view.id]["waits_for"] or "") for view in VIEWS)


def offered(world: World) -> bool:
    seen = world.views()
    return bool(seen) and all(seen[view.id]["state"] == "offered" for view in VIEWS)


async def settled(world: World, to: Connections) -> None:
    """Until ingest has passed on every reading, and features has applied them all."""
    deadline = time.monotonic() + 60
    while (await rows_of(to, EVENTS)).height < world.count:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.3)
    await asyncio.sleep(5.0)  # the watermark is two seconds late, and moves in steps of two
