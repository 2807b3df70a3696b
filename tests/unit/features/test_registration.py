"""What is refused before anything is read, and what is dead-lettered while the rest goes on."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import yaml

from causemesh.catalogue import Catalogue
from causemesh.errors import Misdeclared, Poison
from services.features.domain.engine import ViewState
from services.features.domain.events import read_events
from services.features.domain.memory import check_budget, entity_bytes
from services.features.domain.parsing import parse_views
from services.features.registration import check_views
from services.features.rekeying import view_index

ROOT = Path(__file__).parents[3]
CATALOGUE = Catalogue.load([ROOT / "tests" / "project"])
GIB = 2**30
BODY = {"event": "reading", "entity": "sensor", "features": {"value": ["mean 1h"]}}


def views(**change: Any) -> Any:
    return parse_views({"views": {"v": {**BODY, **change}}})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"event": "unheard"}, "events.unheard"),
        ({"entity": "door"}, "door"),
        ({"features": {"pressure": ["mean 1h"]}}, "pressure"),
        ({"filter": "colour = 'red'"}, "colour"),
        ({"features": {"site": ["mean 1h"]}}, "is a text, not a number"),
        ({"columns": {"when": "occurred_at"}, "features": {"when": ["max 1h"]}}, "not a number"),
        ({"retracts": "undoes"}, "undoes"),
        ({"features": {"value": ["mean 40d"]}}, "keeps its events for 35 days"),
        ({"features": {"value": ["mean tumbling:20d"]}}, "looks back 40d"),
        ({"entities": 10**8}, "more than the 4,096 MiB"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(change: dict[str, Any], says: str) -> None:
    check_views(views(), CATALOGUE, 4 * GIB)
    with pytest.raises(Misdeclared) as refused:
        check_views(views(**change), CATALOGUE, 4 * GIB)
    assert says in str(refused.value)


def test_a_text_can_be_counted() -> None:
    check_views(views(features={"site": ["distinct 1h", "share3 1h"]}), CATALOGUE, 4 * GIB)


def test_the_projects_of_this_repository_are_served() -> None:
    for folder in (ROOT / "tests" / "project", ROOT / "examples" / "flights"):
        declared = parse_views(yaml.safe_load((folder / "features.yaml").read_text()))
        check_views(declared, Catalogue.load([folder]), 4 * GIB)


@pytest.mark.parametrize(
    "features",
    [
        {"x": ["mean 1h 3h", "min 1h", "last 1h"]},
        {"x": ["latest", "sum tumbling:1h"], "*": ["age"]},
        {"x": ["latest"]},
        {"x": ["p50 1h", "distinct 1h"]},
    ],
)
def test_an_entity_costs_what_is_said(features: dict[str, list[str]]) -> None:
    """Held against the arrays themselves, with as many cells a tile as are taken for granted."""
    (view,) = parse_views({"views": {"v": {"event": "e", "entity": "k", "features": features}}})
    state, count = ViewState(view), 2000
    times = np.arange(view.tiles or 1) * view.tile_us
    one = pl.DataFrame({"occurred_at_us": np.repeat(times, 8), "x": np.arange(8.0 * len(times))})
    keys = pl.DataFrame({"k": [f"k{n}" for n in range(count)], "tenant_id": "t"})
    frame = keys.join(one, how="cross").with_row_index("position").with_columns(source=0)
    state.apply(read_events(view, frame))
    room = 2**11 / count  # arrays grow by doubling
    said = entity_bytes(view)
    assert 0.85 * said < state.memory_bytes() / count < 1.1 * room * said


def test_the_dearest_view_is_named() -> None:
    cheap, dear = views(), views(version=2, features={"value": ["mean 20d", "last 20d"]})
    with pytest.raises(Misdeclared, match="'v@v2' needs"):
        check_budget([*cheap, *dear], 100 * 2**20)
    check_budget([*cheap, *views(version=2, entities=1000)], 100 * 2**20)


def test_how_many_entities_are_expected_is_no_part_of_the_meaning() -> None:
    assert views()[0].fingerprint == views(entities=7)[0].fingerprint


def events(**columns: Any) -> pl.DataFrame:
    base = {"tenant_id": "t", "sensor": "a", "occurred_at_us": 1, "source": 0, "value": 1.0}
    rows = {name: [value] * 3 for name, value in base.items()}
    return pl.DataFrame({**rows, "position": [0, 1, 2], **columns})


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"sensor": ["a", "k" * 10_000, "b"]}, "key of more than 1024 bytes"),
        ({"occurred_at_us": [1, 2**60, 2]}, "event time outside"),
        ({"value": [1.0, float("-inf"), 2.0]}, "infinite"),
    ],
)
def test_a_bad_event_is_named_and_the_others_can_be_read(
    columns: dict[str, list[Any]], says: str
) -> None:
    (view,) = views()
    with pytest.raises(Poison) as refused:
        read_events(view, events(**columns))
    assert list(refused.value.rows) == [1]
    assert says in refused.value.rows[1]
    assert len(read_events(view, events(**columns)[[0, 2]])) == 2


def test_an_event_without_the_entity_is_none_of_the_view_s() -> None:
    (view,) = views()
    assert read_events(view, events(sensor=["a", None, "b"])).position.tolist() == [0, 2]


def test_what_stands_for_a_view_in_its_inputs_does_not_change_with_the_views() -> None:
    """What re-keying sends again after a view was added must have the indexes it had."""
    one = parse_views({"views": {"v": BODY}})
    more = parse_views({"views": {"a": BODY, "v": BODY, "v@v2": BODY}})
    assert view_index(one[0]) == view_index(more[1])
    assert len({view_index(view) for view in more}) == 3


def test_views_that_one_index_would_stand_for_are_refused() -> None:
    alike = ("iiwucoup", "uejgtcuo")
    assert len({zlib.crc32(f"{name}@v1".encode()) & 0x7FFF_FFFF for name in alike}) == 1
    declared = parse_views({"views": dict.fromkeys(alike, BODY)})
    with pytest.raises(Misdeclared, match="share a checksum"):
        check_views(declared, CATALOGUE, 4 * GIB)
