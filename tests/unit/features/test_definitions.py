"""Feature views: what a person writes, what it means, and what is refused."""

from __future__ import annotations

from typing import Any

import polars as pl
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from causemesh.errors import Misdeclared, Poison
from services.features.domain.definitions import Feature, FeatureView, InputColumn
from services.features.domain.durations import default_tile, format_duration, parse_duration
from services.features.domain.events import FEW, NULL, ViewEvents, entity_keys, read_events
from services.features.domain.failures import DefinitionError
from services.features.domain.parsing import parse_views

MINUTE, HOUR, DAY = 60_000_000, 3_600_000_000, 86_400_000_000
DOCUMENT = """
views:
  origin_departures:
    event: flights.departed
    entity: origin
    scope: shared
    placement: broadcast
    filter: cancelled = 0
    columns:
      delay: dep_delay
      late: dep_delay >= 15
    windows: [1h, 3h]
    features:
      "*": [count]
      delay: [mean, max 3h]
      late: [mean 3h]
  weather:
    event: weather.observed
    entity: {origin: station}
    features:
      order: latest
      "*": [age]
    retention: 7d
"""


def test_a_document_becomes_views() -> None:
    departures, weather = parse_views(yaml.safe_load(DOCUMENT))
    assert departures.feature_names == (
        "origin_departures.count_1h",
        "origin_departures.count_3h",
        "origin_departures.delay_mean_1h",
        "origin_departures.delay_mean_3h",
        "origin_departures.delay_max_3h",
        "origin_departures.late_mean_3h",
    )
    assert departures.tile_us == 5 * MINUTE
    assert departures.tiles == 36
    assert (departures.scope, departures.placement) == ("shared", "broadcast")
    assert departures.columns[1] == InputColumn("late", "dep_delay >= 15")
    assert (weather.entity, weather.request_entity) == (("station",), ("origin",))
    assert (weather.version, weather.scope, weather.tiles) == (1, "tenant", 0)
    assert weather.columns == (InputColumn("order", '"order"'),)
    assert weather.retention_us == 7 * DAY


def test_windows_of_every_shape_have_their_own_words() -> None:
    body = {
        "event": "e",
        "entity": "k",
        "features": {
            "*": ["count tumbling:1d session:30m:6h 1h/1d"],
            "x": ["ewma 1h", "first 1h", "mean session:30m:6h/1d"],
        },
    }
    (view,) = parse_views({"views": {"v": body}})
    assert view.feature_names == (
        "v.count_tumbling_1d",
        "v.count_session_30m_6h",
        "v.count_1h_per_1d",
        "v.x_ewma_1h",
        "v.x_first_1h",
        "v.x_mean_session_30m_6h_per_1d",
    )
    assert [window.text for window in view.windows] == [
        "1h",
        "1d",
        "tumbling:1d",
        "session:30m:6h",
        "1h",
    ]
    assert (view.tile_us, view.tiles) == (5 * MINUTE, 2 * DAY // (5 * MINUTE))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"windos": ["1h"]}, "unknown key 'windos'"),
        ({"event": ""}, "names no event type"),
        ({"entity": None}, "names no entity"),
        ({"features": ["count"]}, "must map a column"),
        ({"features": {"x": ["median"]}}, "unknown aggregation 'median'"),
        ({"features": {"x": ["latest 3h"]}}, "latest takes no window"),
        ({"features": {"*": ["sum"]}}, "needs a column"),
        ({"features": {"x": ["age"]}}, "takes no column"),
        ({"features": {"x": ["mean", "mean"]}}, "'x_mean_1h' is defined twice"),
        ({"windows": []}, "has no window"),
        ({"windows": ["1 hour"]}, "'1 hour' is no duration"),
        ({"windows": ["1h", "1d"], "tile": "7m"}, "no multiple of the tile"),
        ({"windows": ["30d"], "tile": "1m"}, "more than 4096"),
        ({"windows": ["7s", "365d"]}, "set `tile` yourself"),
        ({"features": {"x": ["mean session:30m"]}}, "is no window"),
        ({"features": {"x": ["mean session:2h:1h"]}}, "shorter than its gap"),
        ({"features": {"x": ["mean session:30m:6h"]}, "tile": "1h"}, "no multiple of the tile"),
        ({"features": {"x": ["ewma"]}}, "no half-life"),
        ({"features": {"x": ["ewma 1h/2h"]}}, "takes no second window"),
        ({"features": {"x": ["ewma tumbling:1h"]}}, "no duration"),
        ({"scope": "world"}, "scope must be"),
        ({"resolution": 0}, "positive"),
        ({"columns": ["x"]}, "`columns` must map"),
        ({"columns": {"x": "a - avg(a)"}}, "'avg'"),
        ({"columns": {"x": "a +"}}, "is no SQL expression"),
        ({"columns": {"x": "1"}}, "reads no column"),
        ({"filter": "row_number() over (order by a) = 1"}, "'row_number'"),
    ],
)
def test_a_mistake_is_refused_with_the_view_and_what_is_wrong(
    change: dict[str, Any], says: str
) -> None:
    body = {"event": "e", "entity": "k", "windows": ["1h"], "features": {"x": ["mean"]}}
    assert parse_views({"views": {"v": body}})
    with pytest.raises(DefinitionError) as refused:
        parse_views({"views": {"v": {**body, **change}}})
    assert says in str(refused.value)
    assert "view 'v'" in str(refused.value)


def test_a_document_without_views_is_refused() -> None:
    documents: list[dict[str, Any]] = [{}, {"views": {}}, {"views": {"v": None}}]
    for document in documents:
        with pytest.raises(DefinitionError):
            parse_views(document)


def test_features_in_code_are_checked_as_well() -> None:
    def view(feature: Feature) -> FeatureView:
        return FeatureView("v", "e", ("k",), (feature,), (InputColumn("x", "x"),))

    assert view(Feature("ok", "mean", "x", HOUR)).tile_us == 5 * MINUTE
    for feature in (
        Feature("no_window", "mean", "x"),
        Feature("windowed_latest", "latest", "x", HOUR),
        Feature("undeclared", "mean", "y", HOUR),
        Feature("plain_ewma", "ewma", "x", HOUR),
        Feature("decayed_sum", "sum", "x", 8 * HOUR, "decayed", HOUR),
        Feature("ewma_ratio", "ewma", "x", 8 * HOUR, "decayed", HOUR, HOUR),
        Feature("Bad Name", "mean", "x", HOUR),
    ):
        with pytest.raises(DefinitionError):
            view(feature)


def test_a_fingerprint_tells_any_change_of_meaning() -> None:
    one = parse_views(yaml.safe_load(DOCUMENT))[0]
    again = parse_views(yaml.safe_load(DOCUMENT))[0]
    other = parse_views(yaml.safe_load(DOCUMENT.replace(">= 15", ">= 16")))[0]
    assert one.fingerprint == again.fingerprint != other.fingerprint


@pytest.mark.parametrize(
    ("windows", "tile"),
    [
        ([HOUR, 3 * HOUR], 5 * MINUTE),
        ([HOUR, 3 * HOUR, 7 * DAY], 30 * MINUTE),
        ([3 * HOUR], 15 * MINUTE),
        ([7_000_000], 500_000),
        ([30 * DAY], DAY),
        ([], HOUR),
    ],
)
def test_the_default_tile(windows: list[int], tile: int) -> None:
    assert default_tile(windows) == tile


def test_durations_read_back() -> None:
    for text in ("500ms", "90s", "15m", "3h", "7d"):
        assert format_duration(parse_duration(text)) == text
    for wrong in ("0h", "h", "3", 3, None, "1.5h", "-1h"):
        with pytest.raises(ValueError, match="no duration"):
            parse_duration(wrong)


def view_of(**change: Any) -> FeatureView:
    body = {"event": "e", "entity": ["k", "m"], "features": {"x": ["sum 1h"]}, **change}
    return parse_views({"views": {"v": body}})[0]


def events(**columns: Any) -> pl.DataFrame:
    base = {"tenant_id": "t", "k": "a", "m": "b", "occurred_at_us": 1, "source": 0, "position": 0}
    return pl.DataFrame({**base, **columns})


def test_reading_filters_rounds_and_skips_what_names_no_entity() -> None:
    view = view_of(filter="ok", resolution=0.5)
    frame = events(
        x=[1.2, None, float("nan"), 7.0, 8.0],
        ok=[True, True, True, False, None],
        position=[0, 1, 2, 3, 4],
    )
    read = read_events(view, frame)
    assert read.values.tolist() == [[2, NULL, NULL]]
    assert read.position.tolist() == [0, 1, 2]
    assert len(read_events(view, frame.with_columns(m=pl.lit(None, pl.String)))) == 0


def test_comparisons_and_durations_become_numbers() -> None:
    view = view_of(
        columns={"late": "x >= 15", "spent": "b - a"},
        features={"late": ["sum 1h"], "spent": ["sum 1h"]},
        resolution=0.25,
    )
    times = pl.Series([0, 0], dtype=pl.Datetime("us"))
    frame = events(x=[15, 3]).with_columns(
        a=times, b=pl.Series([1_500_000, None], dtype=pl.Datetime("us"))
    )
    assert read_events(view, frame).values.tolist() == [[4, 0], [6, NULL]]


def test_what_cannot_be_a_number_is_refused() -> None:
    for wrong in (float("inf"), 2.0**31):
        with pytest.raises(Poison) as refused:
            read_events(view_of(), events(x=[1.0, wrong]))
        assert list(refused.value.rows) == [1]
    squared = view_of(features={"x": ["std 1h"]})
    with pytest.raises(Poison):
        read_events(squared, events(x=[2.0**22]))
    assert len(read_events(view_of(), events(x=[2.0**22]))) == 1
    with pytest.raises(Misdeclared, match="not a number"):
        read_events(view_of(), events(x=["1"]))
    with pytest.raises(Misdeclared, match="cannot read"):
        read_events(view_of(), events(y=[1.0]))


def test_read_events_travel_as_a_frame_bit_for_bit() -> None:
    view = view_of()
    read = read_events(view, events(x=[1.5, None, -3.25]))
    back = ViewEvents.from_frame(view, read.frame(view))
    assert back.entity.to_list() == read.entity.to_list()
    assert back.values.tolist() == read.values.tolist()
    nothing = read_events(view, events(x=[1.0]).clear())
    assert len(ViewEvents.from_frame(view, nothing.frame(view))) == 0


def test_different_parts_never_make_the_same_key() -> None:
    view = view_of()
    parts = [("a\x1f", "b", "c"), ("a", "\x1fb", "c"), ("a\x1e1", "b", "c"), ("a", "b\x1fc", "")]
    frame = pl.DataFrame(parts, schema=["tenant_id", "k", "m"], orient="row")
    assert entity_keys(frame, view, view.entity).n_unique() == len(parts)
    joined = frame.select(pl.concat_str(pl.all(), separator="\x1f")).to_series()
    assert joined.n_unique() < len(parts)  # control: plain joining mixes up tenants
    plain = pl.DataFrame({"tenant_id": "t", "k": "a", "m": "b"})
    assert entity_keys(plain, view, view.entity).to_list() == ["t\x1fa\x1fb"]


_PART = st.none() | st.text("a\x1e\x1f0", max_size=4)


@settings(deadline=None)
@given(st.lists(st.tuples(st.just("t"), _PART, _PART), min_size=1, max_size=9))
def test_keys_of_few_rows_are_those_of_many(rows: list[tuple[str | None, ...]]) -> None:
    """How many rows come together must not show: the same entity, the same key."""
    view = view_of()
    names = dict.fromkeys(("tenant_id", "k", "m"), pl.String)
    few = pl.DataFrame(rows, schema=names, orient="row")
    many = pl.concat([few] * (FEW + 1))
    singly = [entity_keys(part, view, view.entity).item() for part in few.iter_slices(1)]
    assert singly * (FEW + 1) == entity_keys(many, view, view.entity).to_list()
