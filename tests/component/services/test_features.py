"""Features as a process: what a request sees, what is published, and where it came from."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import numpy as np
import polars as pl
import pytest

from tests.component.services.conftest import (
    PREDICTIONS,
    READINGS,
    TASKS,
    VECTORS,
    Outside,
    reading,
    request,
    total_model,
)

pytestmark = pytest.mark.servers
SENSOR = ("sensor_readings.count_1h", "sensor_readings.value_mean_1h")
FEATURES = [*SENSOR, "site_readings.value_mean_1h", "input.row"]
VALUES = [1.0, 2.0, 6.0]
VECTOR = [3.0, 3.0, 3.0, 1.0]


def floats(vector: bytes) -> list[float]:
    return np.frombuffer(vector, "<f4").tolist()


async def ask(outside: Outside, tenant: str, request_id: str) -> dict[str, Any]:
    """The task of a live request about the tenant's sensor and site."""
    entities = [
        {"name": "sensor", "value": f"{tenant}-s"},
        {"name": "site", "value": f"{tenant}-site"},
    ]
    row = request(tenant, request_id, f"total-{tenant}", entities=entities)
    # by its key, as clients do: features are where the entity's partition is
    await outside.client.request([row])
    which = (pl.col("tenant_id") == tenant) & (pl.col("request_id") == request_id)
    (task,) = (await outside.eventually_where(TASKS, which)).to_dicts()
    return task


async def current(outside: Outside, tenant: str) -> pl.DataFrame:
    """The published vectors of the sensor, once one holds every reading."""
    which = pl.col("entity") == f"{tenant}\x1f{tenant}-s"
    whole = pl.col("vector").bin.starts_with(np.array([3.0], "<f4").tobytes())
    await outside.eventually_where(VECTORS, which & whole)
    return (await outside.written(VECTORS)).filter(which)


async def test_events_become_vectors_that_can_be_explained(outside: Outside, tenant: str) -> None:
    await outside.register(f"total-{tenant}", 1, total_model(4), features=FEATURES)
    rows = [reading(tenant, f"e{n}", value=value) for n, value in enumerate(VALUES)]
    await outside.client.produce("reading", rows)
    await outside.eventually(READINGS, tenant, 3)

    published = await current(outside, tenant)
    assert set(published["view"]) == {"sensor_readings@v1"}
    assert published["sequence"].is_sorted()
    newest = published.tail(1).to_dicts()[0]
    assert floats(newest["vector"]) == [3.0, 3.0, 6.0]  # count, mean, latest
    assert newest["tenant_id"] == tenant

    # A live request sees the events that were applied before it, of both views.
    task = await ask(outside, tenant, "one")
    assert floats(task["vector"]) == VECTOR
    (made,) = (await outside.eventually(PREDICTIONS, tenant, 1)).to_dicts()
    assert (made["vector"], made["score"]) == (task["vector"], sum(VECTOR))

    await check_explained(outside, tenant, task)
    await check_shown(outside, tenant)

    # Restored from its checkpoint, the process gives the same vector.
    outside.mesh.kill("features")
    assert (await ask(outside, tenant, "two"))["vector"] == task["vector"]


async def check_explained(outside: Outside, tenant: str, task: dict[str, Any]) -> None:
    """Recomputed from the log as of the task: the same numbers, and the events behind them."""
    asked = {
        "tenant_id": tenant,
        "entities": {"sensor": f"{tenant}-s", "site": f"{tenant}-site"},
        "features": FEATURES,
        "as_of": task["features_as_of"].isoformat(),
    }
    told = await outside.done("features", "POST", "/explain", json=asked)
    views = [name for name in FEATURES if not name.startswith("input.")]
    assert [told["features"][name] for name in views] == floats(task["vector"])[:3]
    for view in ("sensor_readings", "site_readings"):
        assert told["events"][view]["events"] == 3
        (newest,) = told["events"][view]["newest"][-1:]
        source = (newest["topic"], newest["partition"], newest["position"])
        batch = await outside.reader.one(*source)
        assert batch is not None
        assert batch.frame["tenant_id"].to_list() == [tenant]
    nothing = asked | {"as_of": datetime(2020, 1, 1, tzinfo=UTC).isoformat()}
    told = await outside.done("features", "POST", "/explain", json=nothing)
    assert set(told["events"]["site_readings"]["newest"]) == set()
    assert told["features"]["site_readings.value_mean_1h"] is None


async def check_shown(outside: Outside, tenant: str) -> None:
    views = await outside.done("features", "GET", "/views")
    assert {view["view"] for view in views} >= {"sensor_readings@v1", "site_readings@v1"}
    path = f"/views/sensor_readings/entities/{tenant}-s"
    shown = await outside.done("features", "GET", path, params={"tenant_id": tenant})
    wanted = {"count_1h": 3.0, "value_mean_1h": 3.0, "value_latest": 6.0}
    assert shown["features"] == {f"sensor_readings.{name}": value for name, value in wanted.items()}
    strange = await outside.ask("features", "GET", path, params={"tenant_id": f"{tenant}-other"})
    assert (strange.status_code, strange.json()["type"]) == (
        404,
        "urn:causemesh:problem:not_found",
    )
    untold = await outside.ask("features", "GET", path)
    assert untold.status_code == 422
    await check_read(outside, tenant, path)
    answer = await outside.ask("features", "GET", "/views", headers={"Authorization": "no"})
    assert answer.status_code == 401


async def check_read(outside: Outside, tenant: str, path: str) -> None:
    """Many vectors at once, the past from the log, and how the state is."""
    sensors = [{"sensor": f"{tenant}-s"}, {"sensor": f"{tenant}-none"}]
    body = {"view": "sensor_readings@v1", "tenant_id": tenant, "entities": sensors}
    told = await outside.done("features", "POST", "/vectors", json=body)
    assert [(row["status"], row["values"]) for row in told["rows"]] == [
        ("found", [3.0, 3.0, 6.0]),
        ("unknown", None),
    ]
    past = await outside.done(
        "features", "GET", f"{path}/history", params={"tenant_id": tenant, "limit": 2}
    )
    assert [point["values"] for point in past["points"]][-1] == [3.0, 3.0, 6.0]
    # two readings of one microsecond are one point
    assert len(past["points"]) + past["skipped"] in (2, 3)
    fresh = await outside.done("features", "GET", "/freshness")
    assert len(fresh) == 2 * 4
    assert all(one["applied_until_us"] is not None for one in fresh)
    counts = await outside.done("features", "GET", "/cardinality")
    assert sum(counts[0]["entities"].values()) >= 1
    costs = await outside.done("features", "GET", "/memory")
    assert costs["total_bytes"] > 0
