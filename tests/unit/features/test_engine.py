"""The columnar engine against the plain reference: same bits, whatever the batches."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from causemesh.errors import Fatal, Misdeclared
from services.features.domain.definitions import Aggregation, Feature, FeatureView, InputColumn
from services.features.domain.engine import ViewState
from services.features.domain.events import ViewEvents, read_events
from services.features.domain.vectors import Vectors
from services.features.domain.windows import Shape
from tests.unit.features.reference import Event, expected, frame_of

TILE = 10
KINDS: tuple[Aggregation, ...] = ("count", "sum", "mean", "min", "max", "std", "last")
SKETCHED: list[tuple[str, Aggregation, float]] = [
    ("distinct", "distinct", 0),
    ("p0", "quantile", 0.0),
    ("p50", "quantile", 0.5),
    ("p99", "quantile", 0.99),
    ("top1", "top", 1),
    ("top3", "top", 3),
    ("share1", "share", 1),
    ("share2", "share", 2),
]
ENTITIES = ["a", "b", "c"]
ASKED = [*ENTITIES, "unknown", None]


def more_features() -> list[Feature]:
    """Every other shape of window, every aggregation over each, and ratios."""
    shapes: list[tuple[str, int, Shape, int]] = [
        ("day", 2 * TILE, "tumbling", 0),
        ("week", 3 * TILE, "tumbling", 0),
        ("visit", 5 * TILE, "session", TILE),
        ("stay", 7 * TILE, "session", 2 * TILE),
    ]
    features = [Feature(f"events_{n}", "count", None, w, s, p) for n, w, s, p in shapes]
    for column in ("x", "y"):
        features += [
            Feature(f"{column}_{kind}_{name}", kind, column, window_us, shape, part_us)
            for kind in (*KINDS, "first")
            for name, window_us, shape, part_us in shapes
        ]
        features += [Feature(f"{column}_first_{n}", "first", column, n * TILE) for n in (1, 3, 5)]
        features += [
            Feature(f"{column}_ewma_{n}", "ewma", column, 8 * n * TILE, "decayed", n * TILE)
            for n in (1, 2)
        ]
        features += [
            Feature(f"{column}_{kind}_ratio", kind, column, TILE, per_us=5 * TILE) for kind in KINDS
        ]
        features += [
            Feature(f"{column}_{name}_{w}_{s}", kind, column, w, s, p, parameter=parameter)
            for name, kind, parameter in SKETCHED
            for _, w, s, p in [*shapes, ("", 3 * TILE, "sliding", 0), ("", TILE, "sliding", 0)]
        ]
        features.append(
            Feature(f"{column}_day_ratio", "sum", column, 2 * TILE, "tumbling", 0, 4 * TILE)
        )
    return features


def make_view(retention_us: int | None = None, wide: bool = False) -> FeatureView:
    features = [Feature("events_1", "count", None, TILE), Feature("age", "age")]
    for column in ("x", "y"):
        features.append(Feature(f"{column}_latest", "latest", column))
        features += [
            Feature(f"{column}_{kind}_{tiles}", kind, column, tiles * TILE)
            for kind in KINDS
            for tiles in (1, 3, 5)
        ]
    features += more_features() if wide else []
    return FeatureView(
        name="v",
        event_type="e",
        entity=("k",),
        scope="shared",
        features=tuple(features),
        columns=(InputColumn("x", "x"), InputColumn("y", "y")),
        tile_us=TILE,
        retention_us=retention_us,
    )


numbers = st.one_of(
    st.none(),
    st.just(float("nan")),
    st.floats(-1e6, 1e6),
    st.integers(-3, 3).map(float),
)


@st.composite
def event_lists(draw: st.DrawFn, most: int = 40) -> list[Event]:
    count = draw(st.integers(0, most))
    return [
        Event(
            draw(st.sampled_from([*ENTITIES, None])),
            draw(st.integers(-30, 170)),
            draw(st.integers(0, 2)),
            position,
            (draw(numbers), draw(numbers)),
        )
        for position in range(count)
    ]


def read(view: FeatureView, events: Sequence[Event]) -> ViewEvents:
    return read_events(view, frame_of(view, events))


def same_bits(got: Vectors, want: Vectors) -> None:
    assert got.dtype == np.float32
    assert got.shape == want.shape
    np.testing.assert_array_equal(got, want)
    assert got.tobytes() == want.tobytes()


def reference(view: FeatureView, events: Sequence[Event], as_of: Sequence[int]) -> Vectors:
    rows = [expected(view, events, e, t) for e, t in zip(cycle(len(as_of)), as_of, strict=True)]
    return np.array(rows, np.float32).reshape(len(as_of), len(view.features))


def cycle(count: int) -> list[str | None]:
    return [ASKED[i % len(ASKED)] for i in range(count)]


def restored(state: ViewState) -> ViewState:
    fresh = ViewState(state.view)
    fresh.restore(state.snapshot())
    return fresh


@settings(max_examples=60, deadline=None)
@given(
    events=event_lists(),
    cuts=st.lists(st.integers(-30, 190), max_size=6),
    retention=st.sampled_from([None, 35, 80]),
    wide=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_chunking_order_snapshot_and_eviction_give_the_reference_bits(
    events: list[Event], cuts: list[int], retention: int | None, wide: bool, seed: int
) -> None:
    view, rng = make_view(retention, wide), random.Random(seed)
    state, applied = ViewState(view), -40
    for cut in [*sorted(cuts), 200]:
        due = [e for e in events if applied <= e.occurred_at_us < cut]
        rng.shuffle(due)
        as_of = np.array([rng.randint(applied, cut) for _ in range(15)], np.int64)
        got = state.answer_chunk(read(view, due), cycle(15), as_of)
        same_bits(got, reference(view, events, as_of.tolist()))
        half = rng.randint(0, len(due))
        for part in (due[:half], due[half:]):
            state.apply(read(view, part))
        assert state.apply(read(view, []), until_us=cut).late == 0
        if rng.random() < 0.3:
            state = restored(state)
        if rng.random() < 0.3:
            state.evict(cut)
        applied = cut
        at_cut = np.full(5, cut, np.int64)
        same_bits(state.answer(cycle(5), at_cut), reference(view, events, at_cut.tolist()))


@settings(max_examples=60, deadline=None)
@given(
    events=event_lists(),
    slice_us=st.integers(1, 60),
    wide=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_one_chunk_equals_the_loop_over_its_slices(
    events: list[Event], slice_us: int, wide: bool, seed: int
) -> None:
    view, rng = make_view(wide=wide), random.Random(seed)
    times = sorted(rng.randint(-30, 250) for _ in range(20))
    as_of = np.array([t // slice_us * slice_us for t in times], np.int64)
    chunked = ViewState(view).answer_chunk(read(view, events), cycle(20), as_of)
    state, looped, applied = ViewState(view), [], -1000
    for entity, s in zip(cycle(20), as_of.tolist(), strict=True):
        state.apply(read(view, [e for e in events if applied <= e.occurred_at_us < s]), s)
        applied = max(applied, s)
        looped.append(state.answer([entity], np.array([s]))[0])
    same_bits(chunked, np.array(looped))


@settings(max_examples=80, deadline=None)
@given(
    events=event_lists(),
    late=event_lists(most=12),
    wide=st.booleans(),
    until=st.integers(0, 170),
)
def test_late_events_reach_the_tiles_that_answers_can_still_see(
    events: list[Event], late: list[Event], wide: bool, until: int
) -> None:
    view = make_view(wide=wide)
    state = ViewState(view)
    on_time = [e for e in events if e.occurred_at_us < until]
    late = [
        Event(e.entity, e.occurred_at_us, 3, e.position, e.inputs)
        for e in late
        if e.occurred_at_us < until
    ]
    state.apply(read(view, on_time), until)
    gone = (until - 1) // TILE - view.tiles
    dropped = [e for e in late if e.entity and e.occurred_at_us // TILE <= gone]
    assert state.apply(read(view, late)).late == len(dropped)
    as_of = np.array([until + step for step in range(10)], np.int64)
    same_bits(state.answer(cycle(10), as_of), reference(view, on_time + late, as_of.tolist()))


def test_touched_rows_name_the_entities_that_changed() -> None:
    view, state = make_view(), ViewState(make_view())
    state.apply(read(view, [Event("a", 1, 0, 0, (1.0, None)), Event("b", 2, 0, 1, (1.0, None))]))
    touched = state.apply(read(view, [Event("b", 3, 0, 2, (2.0, None))])).touched
    assert touched.tolist() == state.index.find(pl.Series(["b"])).tolist()


@given(event_lists())
def test_touched_rows_are_each_named_once_and_rise(events: list[Event]) -> None:
    state = ViewState(make_view())
    coded = state.encode(read(state.view, events))
    assert state.apply(coded).touched.tolist() == sorted(set(coded.rows.tolist()))


def test_float_sums_without_the_grid_depend_on_the_grouping() -> None:
    """Control: why inputs are put on a grid. Plain float64 sums differ with the chunking."""
    rng = np.random.default_rng(7)
    values = rng.normal(0, 1, 4000) * 10.0 ** rng.integers(-6, 6, 4000)
    groupings = [np.array_split(values, parts) for parts in (1, 3, 7, 100)]
    naive = {float(sum(part.sum() for part in parts)) for parts in groupings}
    assert len(naive) > 1
    view = FeatureView(
        name="v", event_type="e", entity=("k",), scope="shared", tile_us=TILE,
        features=(Feature("x_sum", "sum", "x", TILE), Feature("x_std", "std", "x", TILE)),
        columns=(InputColumn("x", "x"),),
    )  # fmt: skip
    answers = set()
    for parts in groupings:
        state = ViewState(view)
        for part in parts:
            state.apply(read(view, [Event("a", 1, 0, i, (v,)) for i, v in enumerate(part)]))
        answers.add(state.answer(["a"], np.array([5])).tobytes())
    assert len(answers) == 1


def test_ties_are_broken_by_source_and_position_not_by_arrival() -> None:
    view = make_view()
    tied = [Event("a", 5, s, p, (float(10 * s + p), None)) for s in (0, 1) for p in (0, 1, 2)]
    place = [f.name for f in view.features].index("x_last_1")
    answers, by_arrival = set(), set()
    for seed in range(20):
        order = random.Random(seed).sample(tied, len(tied))
        state = ViewState(view)
        for event in order:
            state.apply(read(view, [event]))
        answers.add(float(state.answer(["a"], np.array([6]))[0, place]))
        by_arrival.add(order[-1].inputs[0])
    assert answers == {12.0}
    assert len(by_arrival) > 1  # control: the order of arrival would have shown


def test_std_is_exact_for_a_small_spread_about_a_large_mean() -> None:
    view = make_view()
    values = [1_000_000.0, 1_000_001.0, 1_000_002.0]
    state = ViewState(view)
    state.apply(read(view, [Event("a", 1, 0, i, (v, None)) for i, v in enumerate(values)]))
    got = state.answer(["a"], np.array([2]))[0, [f.name for f in view.features].index("x_std_1")]
    assert got == np.float32(np.sqrt(2 / 3))
    # control: the textbook formula in float32 or with float sums of squares loses it
    squares = np.float32(sum(np.float32(v) ** 2 for v in values) / np.float32(3))
    variance = max(float(squares - np.float32(1_000_001.0) ** 2), 0.0)
    assert abs(np.sqrt(variance) - got) > 0.1


def test_a_live_answer_includes_applied_events_of_its_own_tile_but_no_later_tile() -> None:
    view, state = make_view(), ViewState(make_view())
    state.apply(read(view, [Event("a", t, 0, t, (1.0, None)) for t in (3, 8, 12)]))
    place = [f.name for f in view.features].index("events_1")
    assert state.answer(["a"], np.array([5]))[0, place] == 2
    assert state.answer(["a"], np.array([13]))[0, place] == 1


def test_eviction_forgets_only_what_no_answer_can_see() -> None:
    view, state = make_view(retention_us=35), ViewState(make_view(retention_us=35))
    state.apply(read(view, [Event("a", 0, 0, 0, (1.0, None)), Event("b", 60, 0, 1, (1.0, None))]))
    assert state.evict(50) == 0  # the window of a's tile has passed at 50, b is alive
    assert state.evict(61, keep=state.index.find(pl.Series(["a"]))) == 0
    assert state.evict(61) == 1
    assert state.entities == ["b"]
    state.apply(read(view, [Event("c", 71, 0, 2, (None, 2.0))]))
    names = [f.name for f in view.features]
    answers = dict(zip(names, state.answer(["c"], np.array([72]))[0].tolist(), strict=True))
    assert (answers["y_sum_5"], answers["events_1"]) == (2.0, 1.0)
    # c has the row that a had, and even a live request from the past sees nothing of a in it
    assert state.index.find(pl.Series(["c"])).tolist() == [1]
    past = dict(zip(names, state.answer(["c"], np.array([5]))[0].tolist(), strict=True))
    assert past["events_1"] == 0.0
    assert np.isnan(past["x_latest"])


def test_latest_is_remembered_for_the_retention() -> None:
    state = ViewState(make_view(retention_us=90))
    place = [f.name for f in state.view.features].index("x_latest")
    state.apply(read(state.view, [Event("a", 0, 0, 0, (1.0, None))]))
    assert state.evict(90) == 0
    assert state.answer(["a"], np.array([90]))[0, place] == 1.0
    assert np.isnan(state.answer(["a"], np.array([91]))[0, place])
    assert state.evict(91) == 1
    unlimited = ViewState(make_view())
    unlimited.apply(read(unlimited.view, [Event("a", 0, 0, 0, (1.0, None))]))
    assert unlimited.evict(10**9) == 0  # `latest` has no end of its own


def test_a_snapshot_of_another_view_or_cut_short_is_refused() -> None:
    state = ViewState(make_view())
    state.apply(read(state.view, [Event("a", 0, 0, 0, (1.0, None))]))
    saved = state.snapshot()
    with pytest.raises(Misdeclared, match="new version"):
        ViewState(make_view(retention_us=7)).restore(saved)
    with pytest.raises(Fatal, match="cut short"):
        ViewState(make_view()).restore(saved[:-3])
    with pytest.raises(Fatal, match="not a feature snapshot"):
        ViewState(make_view()).restore(b"x" * 40)


def test_memory_grows_with_entities() -> None:
    view, state = make_view(), ViewState(make_view())
    before = state.memory_bytes()
    state.apply(read(view, [Event(f"e{i}", 1, 0, i, (1.0, 2.0)) for i in range(1000)]))
    assert state.memory_bytes() > before + 1000 * 8 * view.tiles
    assert len(state.entities) == 1000
