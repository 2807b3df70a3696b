"""A transform's output is like any event type: views, requests, the lake, the way back."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import polars as pl
import pytest

from causemesh.cli.context import Connections
from causemesh.cli.tracing import both_ways
from causemesh.faultpoints import Point
from causemesh.lake.reading import Lake
from causemesh.lake.settings import lake_settings
from causemesh.settings import ServiceSettings
from causemesh.trace import Tracer
from services.features.domain.definitions import FeatureView
from services.features.domain.events import SEPARATOR
from tests.chaos.feature_mesh import Recomputed
from tests.component.transforms.sessions import (
    MODELS,
    SESSIONS,
    TAPS,
    TASKS,
    VIEWS,
    SessionsMesh,
    features_of,
    opened,
    until,
)
from tests.unit.features.reference import expected

pytestmark = [pytest.mark.servers, pytest.mark.timeout(420)]
HOME = Path(".causemesh-test-transforms")
ROOT = Path(__file__).parents[3]
FIELDS = ("visitor", "number", "page", "taps", "spent", "closed_by")


@asynccontextmanager
async def transforms(
    mesh: SessionsMesh, log: Path, fault: str = ""
) -> AsyncIterator[asyncio.subprocess.Process]:
    """The transforms' process, ended whatever happens."""
    environment = {**os.environ, **mesh.environment(), "CAUSEMESH_FAULT": fault}
    with log.open("ab") as output:
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "services.features.transforms.app",
            cwd=ROOT, env={**environment, "POLARS_MAX_THREADS": "1"}, stdout=output, stderr=output,
        )  # fmt: skip
    try:
        yield child
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()


async def run_and_kill(mesh: SessionsMesh, log: Path) -> None:
    """Spans of events while the process is killed: between what it has sent and its tables, until
    sessions lie in the log twice, then at any time. At the end every request is answered."""
    while not await twice(mesh):  # it may have sent no session in the batch that it was killed in
        async with transforms(mesh, log, f"{Point.TRANSFORM_SENT}:kill:8") as child:
            async with asyncio.timeout(90):
                while child.returncode is None:
                    await mesh.span()
                    await asyncio.sleep(0.5)
            assert child.returncode == -signal.SIGKILL, f"see {log}"
        async with transforms(mesh, log) as child:
            before = (await mesh.raw(SESSIONS)).height
            for _ in range(4):
                await mesh.span()
            await until(partial(more_than, mesh, before))
            child.kill()
    async with transforms(mesh, log):
        for _ in range(4):
            await mesh.span()
        await until(lambda: answered(mesh))


async def twice(mesh: SessionsMesh) -> bool:
    """Whether a session lies in the log twice."""
    raw = await mesh.raw(SESSIONS)
    return bool(raw.height and raw.height > raw["event_id"].n_unique())


async def more_than(mesh: SessionsMesh, count: int) -> bool:
    return (await mesh.raw(SESSIONS)).height > count


async def answered(mesh: SessionsMesh) -> bool:
    tasks = await mesh.log(TASKS)
    return tasks.height >= len(mesh.requests)


async def check_output(mesh: SessionsMesh) -> pl.DataFrame:
    """The sessions that readers see are those of the function over the feed; returns them."""
    found = await mesh.log(SESSIONS)
    names = ["event_id", "tenant_id", "occurred_at", "cause", *FIELDS]
    rows = found.select(names).to_dicts()
    assert {row["event_id"]: row for row in rows} == await mesh.sessions_by_the_log()
    assert len({row["event_id"] for row in rows}) == len(rows) > 100
    # every tap of somebody was fed, once
    fed, taps = await mesh.log(mesh.transform.feed), await mesh.log(TAPS)
    assert fed.height == taps["visitor"].is_not_null().sum()
    return found


def vector_of(recomputed: Recomputed, task: Mapping[str, Any], asked: Mapping[str, Any]) -> bytes:
    """The whole vector of a task, its views one after another, by the log alone."""
    as_of_us = round(task["features_as_of"].timestamp() * 1e6)
    entities = {one["name"]: one["value"] for one in asked["entities"]}
    parts = []
    for name in MODELS[task["model"]]:
        view = VIEWS[f"{name}@v1"]
        key = key_of(view, task["tenant_id"], entities[view.entity[0]])
        if (view.id, key) in recomputed.entities:
            parts.append(recomputed.vector(view.id, key, as_of_us))
        else:
            parts.append(np.array(expected(view, [], key, as_of_us), "<f4").tobytes())
    return b"".join(parts)


def key_of(view: FeatureView, tenant: str, entity: str) -> str:
    return entity if view.scope == "shared" else f"{tenant}{SEPARATOR}{entity}"


async def check_vectors(mesh: SessionsMesh, sessions: pl.DataFrame) -> list[dict[str, Any]]:
    """Every request has its one answer, by the sessions before its minute; returns the tasks."""
    tasks = (await mesh.log(TASKS)).to_dicts()
    assert {task["request_id"] for task in tasks} == set(mesh.requests)
    assert len(tasks) == len(mesh.requests)
    assert [task["failure"] for task in tasks if task["failure"]] == []
    clean = Recomputed(sessions, VIEWS)
    wrong = [
        task["request_id"]
        for task in tasks
        if vector_of(clean, task, mesh.requests[task["request_id"]]) != task["vector"]
    ]
    assert wrong == []
    assert {name for name in MODELS if sees_something(tasks, name)} == set(MODELS)
    return tasks


def sees_something(tasks: list[dict[str, Any]], model: str) -> bool:
    """Whether most vectors of a model count sessions in its first view."""
    counts = [np.frombuffer(t["vector"], "<f4")[0] for t in tasks if t["model"] == model]
    return bool(counts) and sum(count > 0 for count in counts) > len(counts) / 2


async def check_control(mesh: SessionsMesh, tasks: list[dict[str, Any]]) -> None:
    """A reader that drops nothing sees sessions twice, and gives other vectors."""
    naive = Recomputed(await mesh.raw(SESSIONS), VIEWS)
    assert any(
        vector_of(naive, task, mesh.requests[task["request_id"]]) != task["vector"]
        for task in tasks
    )


async def check_lake(mesh: SessionsMesh, sessions: pl.DataFrame) -> None:
    """The table of the output has each record once, where it lies in the log."""
    last = {n: int(part["position"].max()) for (n,), part in sessions.group_by("source")}  # type: ignore[arg-type]

    def read() -> list[dict[str, Any]] | None:
        settings = lake_settings(mesh.mesh.environment())
        with Lake.open(settings, mesh.catalogue, mesh.project) as lake:
            progress = lake.progress("decoded.events_session_closed")
            if any(progress.of(number).position < at for number, at in last.items()):
                return None
            frame = lake.select("session_closed").lazy().collect()
        return placed(frame, "_partition", "_position")

    async def whole() -> list[dict[str, Any]] | None:
        return await asyncio.to_thread(read)

    assert await until(whole) == placed(sessions, "source", "position")


def placed(frame: pl.DataFrame, partition: str, position: str) -> list[dict[str, Any]]:
    """Records in the order of the log, by columns that the log and the lake share."""
    at = pl.col("occurred_at").cast(pl.Int64)
    columns = [pl.col(partition).cast(pl.Int64).alias("p"), pl.col(position).alias("o"), at]
    return frame.select(*columns, "event_id", "tenant_id", *FIELDS).sort("p", "o").to_dicts()


async def check_way_back(mesh: SessionsMesh, tasks: list[dict[str, Any]]) -> dict[str, Any]:
    """From a vector to its sessions, and from each over the feed to the tap that closed it;
    returns the task of such a vector."""
    with_sessions: list[dict[str, Any]] = []
    tracer = Tracer(mesh.bus, mesh.catalogue, mesh.decoder)
    for task in [one for one in tasks if one["model"] == "of_visitor"][-3:]:
        asked = mesh.requests[task["request_id"]]
        names = features_of("of_visitor")
        told = await mesh.api("POST", "/explain", json={
            "tenant_id": task["tenant_id"],
            "entities": {one["name"]: one["value"] for one in asked["entities"]},
            "features": names,
            "as_of": task["features_as_of"].isoformat(),
        })  # fmt: skip
        values = [np.nan if told["features"][n] is None else told["features"][n] for n in names]
        assert np.array(values, "<f4").tobytes() == task["vector"]
        for place in told["events"]["visits"]["newest"]:
            session = await tracer.at(place["topic"], place["partition"], place["position"])
            assert session is not None
            assert session.topic == SESSIONS
            chain = await tracer.causes(session)
            assert [one.topic for one in chain] == [mesh.transform.feed, TAPS, "inbox.tapped"]
            for tap in chain[1:]:
                assert tap.record["tap_id"] == session.record["closed_by"]
                assert tap.record["visitor"] == session.record["visitor"]
            (again,) = [n for n in await tracer.effects(chain[0]) if n.topic == SESSIONS]
            assert again == session
        if told["events"]["visits"]["newest"]:
            with_sessions.append(task)
    return with_sessions[-1]


class Apis:
    """The APIs that a trace asks: features' own; of inference, which does not run, its versions."""

    services: tuple[str, ...] = ("features", "inference")

    def __init__(self, mesh: SessionsMesh) -> None:
        self._mesh = mesh

    def client(self, service: str) -> httpx.Client:
        if service == "features":
            return self._mesh.mesh.client(service)
        versions = [{"version": 1, "features": features_of("of_visitor")}]
        transport = httpx.MockTransport(lambda _: httpx.Response(200, json=versions))
        return httpx.Client(base_url="http://inference", transport=transport)


async def check_trace(mesh: SessionsMesh, task: Mapping[str, Any]) -> None:
    """`causemesh trace` of a request shows the same way, down to the taps."""
    tracer = Tracer(mesh.bus, mesh.catalogue, mesh.decoder)
    open_to = Connections(
        ServiceSettings(), mesh.catalogue, mesh.bus, mesh.registry, mesh.decoder, mesh.reader,
        tracer,
    )  # fmt: skip
    (node,) = await tracer.find(task["request_id"], [TASKS])
    told = (await both_ways(open_to, Apis(mesh), node)).document()
    vector = next(step for step in told["below"] if step["title"] == "vector")
    assert vector["equal_to_recomputed"]
    (view,) = [step for step in vector["below"] if step["title"] == "view visits"]
    for step in view["below"]:
        feed = the_one_below(step, mesh.transform.feed)
        assert "value" not in feed  # the tap's bytes, which are the next step
        tap = the_one_below(feed, TAPS)
        came = the_one_below(tap, "inbox.tapped")
        assert tap["tap_id"] == came["tap_id"] == came["event_id"]
    assert view["below"]


def the_one_below(step: Mapping[str, Any], topic: str) -> Mapping[str, Any]:
    (found,) = step["below"]
    assert found["title"].startswith(f"because of {topic}[")
    below: Mapping[str, Any] = found
    return below


async def test_views_requests_and_the_lake_on_what_a_killed_transform_makes(tmp_path: Path) -> None:
    async with opened(HOME) as mesh:
        await mesh.register_models()
        await run_and_kill(mesh, tmp_path / "log")
        sessions = await check_output(mesh)
        tasks = await check_vectors(mesh, sessions)
        print(f"  {len(tasks)} vectors on {sessions.height} sessions")
        await check_control(mesh, tasks)
        await check_lake(mesh, sessions)
        await check_trace(mesh, await check_way_back(mesh, tasks))
