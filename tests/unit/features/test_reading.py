"""The reading API: vectors, history, definitions and state, through HTTP without a socket."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, cast

import httpx
import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from causemesh.admin import create_app
from causemesh.bus.partitioner import partitions_of
from causemesh.clock import SystemClock
from causemesh.log import LogReader
from causemesh.runner import NEVER, Batch
from services.features.api import Sources, routes
from services.features.domain.engine import ViewState
from services.features.domain.events import read_events
from services.features.domain.parsing import parse_views
from services.features.explaining import Explainer
from services.features.handlers import Join
from services.features.history import History
from services.features.lateness import LATE
from services.features.plan import Plan, event_frame
from tests.unit.features.test_handlers import CATALOGUE, EVENTS, batch

TOKEN = "a-token-for-reading-features"
SECOND = 1_000_000
HOUR = 3_600 * SECOND
PARTITIONS = 4
VIEWS = parse_views(
    {
        "views": {
            "own": {
                "event": "reading",
                "entity": "sensor",
                "scope": "shared",
                "filter": "value < 1000",
                "features": {"*": ["count 1h"], "value": ["mean 1h", "latest", "p50 1h"]},
                "tile": "5m",
                "retention": "1d",
                "entities": 500,
            },
            "own@v2": {
                "event": "reading",
                "entity": "sensor",
                "features": {"value": ["sum 2h"]},
                "tile": "5m",
            },
            "pair": {
                "event": "reading",
                "entity": {"place": "site", "sensor": "sensor"},
                "placement": "broadcast",
                "features": {"value": ["max 1h"]},
                "tile": "5m",
            },
        }
    }
)
PLAN = Plan.of(VIEWS)
SENSORS = [f"s{n}" for n in range(12)]
NOW_US = 20 * HOUR


def number_of(sensor: str) -> int:
    return int(partitions_of([sensor.encode()], PARTITIONS, unkeyed=0)[0])


def events() -> list[dict[str, Any]]:
    """Every sensor's readings, one of them infinite."""
    rows = [
        {
            "occurred_at": HOUR + n * 97 * SECOND,
            "sensor": SENSORS[n % len(SENSORS)],
            "site": "n" if n % 3 else "s,1",
            "value": float(n),
        }
        for n in range(240)
    ]
    return rows


def batches(poison: bool = False) -> list[Batch]:
    """The events' log: each on the partition of its key."""
    found = []
    for number in range(PARTITIONS):
        rows = [row for row in events() if number_of(row["sensor"]) == number]
        if poison and rows:
            rows.insert(1, {**rows[0], "value": float("-inf")})
        found.append(batch((EVENTS, number), rows, 0))
    return found


class Log:
    """The log as `LogReader` gives it."""

    async def ends(self, topics: Sequence[str]) -> Any:
        return topics

    async def read(self, topics: Any) -> AsyncIterator[Batch]:
        assert list(topics) in ([EVENTS], [LATE])
        for one in batches(poison=True) if EVENTS in topics else []:
            yield one


async def joins(numbers: Sequence[int]) -> dict[int, Join]:
    """The processors of some partitions, at the end of the log."""
    made = {}
    for number in numbers:
        one = Join(
            PLAN, CATALOGUE, number, slice_us=60 * SECOND, clock=SystemClock(), publish_seconds=None
        )
        await one.process(batches(), 8 * HOUR, None)
        made[number] = one
    return made


async def ask(method: str, path: str, held: Mapping[int, Join], **more: Any) -> httpx.Response:
    log = cast(LogReader, Log())
    sources = Sources(
        lambda: held,
        lambda: {number: 8 * HOUR if number else NEVER for number in held},
        lambda: NOW_US,
        lambda topic: CATALOGUE.topic(topic).retention_days,
        PARTITIONS,
        2**30,
    )
    router = routes(PLAN, sources, Explainer(log, VIEWS), History(log))

    async def probe() -> Mapping[str, str]:
        return {}

    app = create_app("features", TOKEN, CollectorRegistry(), probe, [router])
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    headers = {"Authorization": f"Bearer {TOKEN}"}
    async with httpx.AsyncClient(transport=transport, base_url="http://mesh") as api:
        return await api.request(method, f"/v1{path}", headers=headers, **more)


async def done(method: str, path: str, held: Mapping[int, Join], **more: Any) -> Any:
    answer = await ask(method, path, held, **more)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.fixture
async def all_held() -> dict[int, Join]:
    return await joins(range(PARTITIONS))


def alone(view_id: str, sensor: str) -> ViewState:
    """A view's state over one sensor's events only."""
    view = next(one for one in VIEWS if one.id == view_id)
    state = ViewState(view)
    for one in batches():
        found = read_events(view, event_frame(one))
        keys = [sensor, f"t\x1f{sensor}"]
        state.apply(found.take(np.flatnonzero(found.entity.is_in(keys).to_numpy())))
    return state


async def test_many_vectors_at_once_are_those_asked_one_by_one(all_held: dict[int, Join]) -> None:
    entities = [{"sensor": name} for name in [*reversed(SENSORS), "nobody", SENSORS[0]]]
    for name, tenant in (("own", None), ("own@v1", None), ("own@v2", "t")):
        body = {"view": name, "tenant_id": tenant, "entities": entities}
        told = await done("POST", "/vectors", all_held, json=body)
        assert told["view"] == ("own@v2" if name == "own@v2" else "own@v1")
        assert [row["entity"] for row in told["rows"]] == entities
        for row in told["rows"]:
            sensor = row["entity"]["sensor"]
            if sensor == "nobody":
                assert (row["status"], row["values"]) == ("unknown", None)
                continue
            wanted = alone(told["view"], sensor)
            key = sensor if told["view"] == "own@v1" else f"t\x1f{sensor}"
            (vector,) = wanted.answer([key], np.array([8 * HOUR]))
            assert (row["status"], row["as_of_us"]) == ("found", 8 * HOUR)
            numbers = [float("nan") if one is None else one for one in row["values"]]
            np.testing.assert_array_equal(np.array(numbers, np.float32), vector)
            path = f"/views/{name}/entities/{sensor}"
            one = await done("GET", path, all_held, params={"tenant_id": tenant} if tenant else {})
            assert list(one["features"].values()) == row["values"]


async def test_who_holds_an_entity_is_said_for_each() -> None:
    number = number_of(SENSORS[0])
    held = await joins([number])
    body = {"view": "own", "entities": [{"sensor": name} for name in SENSORS]}
    rows = (await done("POST", "/vectors", held, json=body))["rows"]
    for row in rows:
        here = number_of(row["entity"]["sensor"]) == number
        assert row["status"] == ("found" if here else "elsewhere")
    assert {row["status"] for row in rows} == {"found", "elsewhere"}
    # a broadcast view is whole wherever anything is
    pairs = [{"place": "s,1", "sensor": SENSORS[0]}, {"place": "n", "sensor": SENSORS[1]}]
    told = await done(
        "POST", "/vectors", held, json={"view": "pair", "tenant_id": "t", "entities": pairs}
    )
    assert [row["status"] for row in told["rows"]] == ["found", "found"]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"view": "none", "entities": [{"sensor": "s0"}]}, 404),
        ({"view": "own", "entities": []}, 422),
        ({"view": "own", "entities": [{"site": "n"}]}, 422),
        ({"view": "own@v2", "entities": [{"sensor": "s0"}]}, 422),  # whose?
        ({"view": "own", "entities": [{"sensor": "s0"}] * 1_001}, 422),
    ],
)
async def test_what_can_not_be_asked_is_a_problem(
    body: dict[str, Any], status: int, all_held: dict[int, Join]
) -> None:
    answer = await ask("POST", "/vectors", all_held, json=body)
    assert (answer.status_code, answer.json()["status"]) == (status, status)
    assert answer.headers["content-type"] == "application/problem+json"


async def test_history_is_what_the_state_said_after_each_event(all_held: dict[int, Join]) -> None:
    sensor = SENSORS[5]
    mine = sorted(row["occurred_at"] for row in events() if row["sensor"] == sensor)
    path = f"/views/own/entities/{sensor}/history"
    told = await done("GET", path, all_held)
    assert told["source"] == f"log:{EVENTS}"
    assert told["features"] == list(VIEWS[0].feature_names)
    assert [point["as_of_us"] for point in told["points"]] == [at + 1 for at in mine]
    state = ViewState(VIEWS[0])
    own = [read_events(VIEWS[0], event_frame(one)) for one in batches()]
    for point in told["points"]:
        before = point["as_of_us"]
        for found in own:
            at = found.occurred_at_us
            now = (found.entity == sensor).to_numpy() & (at == before - 1)
            state.apply(found.take(np.flatnonzero(now)))
        (vector,) = state.answer([sensor], np.array([before]))
        np.testing.assert_array_equal(np.array(point["values"], np.float32), vector)


async def test_a_part_of_history_can_be_asked_for(all_held: dict[int, Join]) -> None:
    sensor = SENSORS[5]
    path = f"/views/own@v1/entities/{sensor}/history"
    whole = (await done("GET", path, all_held))["points"]
    limits = [datetime.fromtimestamp((whole[n]["as_of_us"] - 1) / 1e6, UTC) for n in (4, 11)]
    asked = {
        "from": limits[0].isoformat(),
        "to": limits[1].isoformat(),
        "limit": 5,
        "feature": ["value_latest", "count_1h"],
    }
    told = await done("GET", path, all_held, params=asked)
    assert told["features"] == ["own.value_latest", "own.count_1h"]
    assert (len(told["points"]), told["skipped"]) == (5, 2)
    assert [one["as_of_us"] for one in told["points"]] == [one["as_of_us"] for one in whole[6:11]]
    assert told["points"][0]["values"] == [whole[6]["values"][2], whole[6]["values"][0]]
    nothing = await done("GET", "/views/own/entities/nobody/history", all_held)
    assert (nothing["points"], nothing["skipped"]) == ([], 0)
    wrong = await ask("GET", path, all_held, params={"feature": "none"})
    assert wrong.status_code == 422


async def test_a_definition_is_whole(all_held: dict[int, Join]) -> None:
    told = await done("GET", "/views/own", all_held)
    assert (told["view"], told["version"], told["fingerprint"]) == (
        "own@v1",
        1,
        VIEWS[0].fingerprint,
    )
    assert told["filter"] == "value < 1000"
    assert (told["tile"], told["retention"], told["entities"]) == ("5m", "1d", 500)
    features = {one["name"]: one for one in told["features"]}
    assert features["value_p50_1h"]["parameter"] == 0.5
    assert features["value_mean_1h"]["window"] == "1h"
    assert features["value_latest"]["window"] is None
    second = await done("GET", "/views/own@v2", all_held)
    assert second["fingerprint"] != told["fingerprint"]
    assert (await ask("GET", "/views/own@v3", all_held)).status_code == 404


async def test_how_the_state_is(all_held: dict[int, Join]) -> None:
    fresh = await done("GET", "/freshness", all_held)
    assert len(fresh) == len(VIEWS) * PARTITIONS
    first = next(one for one in fresh if one["partition"] == 1)
    assert (first["watermark_us"], first["applied_until_us"]) == (8 * HOUR, 8 * HOUR)
    assert first["age_seconds"] == 12 * 3_600
    assert next(one for one in fresh if one["partition"] == 0)["watermark_us"] is None

    all_held[0].evicted["own@v1"] += 7
    counts = {one["view"]: one for one in await done("GET", "/cardinality", all_held)}
    assert sum(counts["own@v1"]["entities"].values()) == len(SENSORS)
    assert counts["own@v1"]["evicted"] == {"0": 7, "1": 0, "2": 0, "3": 0}
    assert counts["own@v1"]["declared"] == 500
    assert len(set(counts["pair@v1"]["entities"].values())) == 1

    told = await done("GET", "/memory", all_held)
    assert told["budget_bytes"] == 2**30
    assert told["total_bytes"] == sum(one["bytes"] for one in told["views"])
    for one in told["views"]:
        assert one["bytes"] == pytest.approx(one["per_entity_bytes"] * one["entities"])
        assert one["bytes"] == sum(
            join.state.store.views[one["view"]].memory_bytes() for join in all_held.values()
        )
    empty = await done("GET", "/memory", {})
    assert [one["per_entity_bytes"] for one in empty["views"]] == [None] * len(VIEWS)
