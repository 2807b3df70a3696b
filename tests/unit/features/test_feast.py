"""To Feast and from it, without Feast; `benchmarks.feast_round_trip` asks the real one."""

from __future__ import annotations

import json
import math
import sys
from bisect import bisect_right
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from causemesh.errors import Misdeclared
from services.features.domain.definitions import Feature, FeatureView, InputColumn
from services.features.domain.parsing import parse_views
from services.features.feast.app import app
from services.features.feast.exporting import definitions, export, feast_names
from services.features.feast.history import TIMESTAMP, key_columns, vector_history
from services.features.feast.importing import imported
from tests.unit.features.reference import Event, expected, frame_of
from tests.unit.features.test_engine import TILE, event_lists, make_view

Vector = tuple[float | None, ...]
VIEWS = """
views:
  door:
    event: opened
    entity: k
    scope: shared
    features: {x: [mean 1h, latest]}
    tile: 5m
    retention: 2h
  door@v2:
    event: opened
    entity: [k, m]
    features: {"*": [count 1h]}
    tile: 5m
"""
DUMP: dict[str, Any] = {
    "entities": [{"spec": {"name": "shop", "joinKey": "shop_id"}}],
    "featureViews": [
        {
            "spec": {
                "name": "prices",
                "entities": ["shop"],
                "features": [
                    {"name": "price", "valueType": "DOUBLE"},
                    {"name": "open", "valueType": "BOOL"},
                    {"name": "label", "valueType": "STRING"},
                    {"name": "Odd", "valueType": "INT64"},
                ],
                "ttl": "7200s",
                "batchSource": {"name": "changes", "fieldMapping": {"Price EUR": "price"}},
            }
        },
        {
            "spec": {
                "name": "stocks",
                "entities": ["shop"],
                "features": [{"name": "stock", "valueType": "INT64"}],
                "ttl": "0s",
                "batchSource": {"name": "stock_taken"},
            }
        },
        {"spec": {"name": "words", "features": [{"name": "w", "valueType": "STRING"}]}},
        {"spec": {"name": "Bad-Name", "features": [{"name": "w", "valueType": "INT64"}]}},
    ],
    "onDemandFeatureViews": [{"spec": {"name": "ratio"}}],
}


def by_entity(history: list[pl.DataFrame]) -> dict[str, tuple[list[int], list[Vector]]]:
    """Where Feast looks: an entity's rows, with their times (microseconds), in order of time."""
    found: dict[str, tuple[list[int], list[Vector]]] = {}
    for frame in history:
        at_us = frame[TIMESTAMP].dt.timestamp("us").to_list()
        for at, entity, vector in zip(
            at_us, frame["k"], frame.drop("k", TIMESTAMP).rows(), strict=True
        ):
            times, vectors = found.setdefault(entity, ([], []))
            assert not times or times[-1] < at
            times.append(at)
            vectors.append(vector)
    return found


@settings(max_examples=40, deadline=None)
@given(events=event_lists(), parts=st.integers(1, 4), every=st.sampled_from([TILE, 7, 40, 95]))
def test_the_newest_row_is_the_answer_at_each_multiple(
    events: list[Event], parts: int, every: int
) -> None:
    view = make_view(retention_us=35, wide=True)
    events = sorted(events, key=lambda e: e.order)
    cuts = [len(events) * part // parts for part in range(parts + 1)]
    frames = [frame_of(view, events[a:b]) for a, b in pairwise(cuts)]
    rows = by_entity(list(vector_history(view, frames, every)))
    entities = {e.entity for e in events if e.entity is not None}
    for at_us in range(-60 // every * every, 400, every):
        for entity in entities:
            want = expected(view, events, entity, at_us)
            times, vectors = rows.get(entity, ([], []))
            if before := bisect_right(times, at_us):
                numbers = [math.nan if one is None else one for one in vectors[before - 1]]
                np.testing.assert_array_equal(np.array(numbers, np.float32), want)
            else:
                want_nothing = expected(view, [], entity, at_us)
                np.testing.assert_array_equal(want, want_nothing)


def test_rows_come_only_where_something_changed() -> None:
    (view, _) = parse_views(yaml.safe_load(VIEWS))
    minute = 60_000_000
    frame = frame_of(view, [Event("a", 0, 0, 0, (1.0,)), Event("b", 200 * minute, 0, 1, (2.0,))])
    rows = pl.concat(vector_history(view, [frame], 5 * minute))
    at = rows.with_columns(pl.col(TIMESTAMP).dt.timestamp("us") // minute)
    # known, an hour after out of the window, two hours after forgotten
    assert at.filter(pl.col("k") == "a")[TIMESTAMP].to_list() == [5, 65, 125]
    assert at.filter(pl.col("k") == "b")[TIMESTAMP].to_list() == [205, 265, 325]
    assert rows.filter(pl.col("k") == "a")["x_latest"].to_list() == [1.0, 1.0, None]


def test_what_never_ends_or_is_out_of_order_is_refused() -> None:
    ages = FeatureView(
        name="v", event_type="e", entity=("k",), scope="shared", features=(Feature("age", "age"),)
    )
    with pytest.raises(Misdeclared, match="for ever"):
        next(vector_history(ages, [], TILE))
    view = make_view(retention_us=35)
    frames = [frame_of(view, [Event("a", at, 0, 0, (1.0, 1.0))]) for at in (50, 20)]
    with pytest.raises(Misdeclared, match="order of time"):
        list(vector_history(view, frames, TILE))


def test_keys_of_several_parts_come_apart_again() -> None:
    view = FeatureView(
        name="v",
        event_type="e",
        entity=("k", "m"),
        features=(Feature("x", "latest", "x"),),
        columns=(InputColumn("x", "x"),),
        retention_us=TILE,
    )
    parts = [("t\x1f", "a\x1e1", "\x1fb"), ("t", "\x1e", ""), ("t", "a", "b\x1f\x1e0")]
    frame = pl.DataFrame(parts, schema=["tenant_id", "k", "m"], orient="row").with_columns(
        occurred_at_us=pl.lit(1, pl.Int64),
        source=pl.lit(0, pl.Int64),
        position=pl.int_range(pl.len()),
        x=pl.lit(1.0),
    )
    first = next(iter(vector_history(view, [frame], TILE)))
    assert sorted(first.select(key_columns(view)).rows()) == sorted(parts)


def fake_feast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules of Feast's names whose classes keep what they are told."""

    def keeping(**told: Any) -> SimpleNamespace:
        return SimpleNamespace(**told)

    feast, types, value_type = (ModuleType(n) for n in ("feast", "feast.types", "feast.value_type"))
    for name in ("Entity", "FeatureView", "Field", "FileSource"):
        setattr(feast, name, keeping)
    types.Float32 = "Float32"  # type: ignore[attr-defined]
    value_type.ValueType = SimpleNamespace(STRING="STRING")  # type: ignore[attr-defined]
    for module in (feast, types, value_type):
        monkeypatch.setitem(sys.modules, module.__name__, module)


def test_the_repository_says_what_the_views_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    views = parse_views(yaml.safe_load(VIEWS))
    at = datetime(2026, 1, 1, tzinfo=UTC)
    door = pl.DataFrame({"k": ["a"], TIMESTAMP: [at], "x_mean_1h": [1.5], "x_latest": [None]})
    pair = pl.DataFrame(
        {"tenant_id": ["t"], "k": ["a"], "m": ["b"], TIMESTAMP: [at], "count_1h": 2}
    )
    rows = export(tmp_path, "shop", views, {"door@v1": [door, door], "door@v2": [pair]})
    assert rows == {"door": 2, "door_v2": 1}
    settings_file = yaml.safe_load((tmp_path / "feature_store.yaml").read_text())
    assert settings_file["project"] == "shop"
    assert pl.read_parquet(tmp_path / "data" / "door.parquet").schema == {
        "k": pl.String,
        TIMESTAMP: pl.Datetime("us", "UTC"),
        "x_mean_1h": pl.Float32,
        "x_latest": pl.Float32,
    }
    assert not list(tmp_path.glob("data/*.partial"))
    fake_feast(monkeypatch)
    found: dict[str, Any] = {}
    exec((tmp_path / "definitions.py").read_text(), found)
    made = found["view_door_v2"]
    assert (made.name, made.ttl) == ("door_v2", timedelta(0))
    assert [one.name for one in made.entities] == ["tenant_id", "k", "m"]
    assert [(one.name, one.dtype) for one in made.schema] == [("count_1h", "Float32")]
    assert (made.source.path, made.source.timestamp_field) == ("data/door_v2.parquet", TIMESTAMP)
    assert made.tags == {
        "causemesh_view": "door@v2",
        "causemesh_fingerprint": views[1].fingerprint,
    }


def test_names_that_feast_cannot_have_are_refused() -> None:
    views = parse_views(yaml.safe_load(VIEWS))
    with pytest.raises(Misdeclared, match="no name of a Feast project"):
        definitions(views, "my shop")
    body = yaml.safe_load(VIEWS)["views"]
    both = parse_views({"views": {**body, "door_v2": body["door"]}})
    with pytest.raises(Misdeclared, match="one name"):
        feast_names(both)


def test_a_registry_becomes_views_of_newest_values() -> None:
    found = imported(json.dumps(DUMP), {"changes": "price_changed"})
    prices, stocks = parse_views(found.document)
    assert (prices.event_type, prices.entity, prices.scope) == (
        "price_changed",
        ("shop_id",),
        "shared",
    )
    assert prices.retention_us == 7_200 * 10**6
    assert [f.name for f in prices.features] == ["price_latest", "open_latest"]
    assert prices.columns[0] == InputColumn("price", '"Price EUR"')
    assert (stocks.event_type, stocks.retention_us) == ("stock_taken", None)
    assert found.left_out == {
        "ratio": "only views of a batch source are taken",
        "prices.label": "STRING is no number",
        "prices.Odd": found.left_out["Bad-Name"],
        "words.w": "STRING is no number",
        "words": "it has no field that is a number",
        "Bad-Name": found.left_out["Bad-Name"],
    }


@pytest.mark.parametrize(
    ("dump", "reason"),
    [
        ("{", "not the JSON"),
        ("[]", "no `featureViews`"),
        ('{"featureViews": []}', "nothing in it"),
        (json.dumps({"featureViews": [DUMP["featureViews"][2]]}), "nothing in it"),
        (json.dumps(DUMP).replace("7200s", "1.5s"), "not whole seconds"),
    ],
)
def test_what_is_no_registry_is_refused(dump: str, reason: str) -> None:
    with pytest.raises(Misdeclared, match=reason):
        imported(dump)


def test_the_command_writes_a_features_yaml(tmp_path: Path) -> None:
    dump, out = tmp_path / "dump.json", tmp_path / "features.yaml"
    dump.write_text(json.dumps(DUMP))
    told = ["import", str(dump), "--out", str(out), "--event", "changes=price_changed"]
    done = CliRunner().invoke(app, told)
    assert done.exit_code == 0, done.output
    assert [view.name for view in parse_views(yaml.safe_load(out.read_text()))] == [
        "prices",
        "stocks",
    ]
    assert "STRING is no number" in done.output
    wrong = CliRunner().invoke(app, [*told[:-1], "changes"])
    assert isinstance(wrong.exception, Misdeclared)


def test_what_a_view_can_not_take_is_left_out() -> None:
    view = make_view(retention_us=35)
    good, bad = Event("a", 3, 0, 0, (1.0, 1.0)), Event("a", 4, 0, 1, (math.inf, 1.0))
    both, one = (
        pl.concat(vector_history(view, [frame_of(view, events)], TILE))
        for events in ([good, bad], [good])
    )
    assert both.equals(one)
