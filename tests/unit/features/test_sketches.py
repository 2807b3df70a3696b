"""Sketches: how near to the exact answers and to the library; and that grouping is moot."""

from __future__ import annotations

from itertools import pairwise

import datasketches
import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from causemesh.errors import Misdeclared
from services.features.domain.cells import Cells, CellStore, reduced, uncrowded
from services.features.domain.definitions import FeatureView
from services.features.domain.engine import ViewState
from services.features.domain.events import Ints, read_events
from services.features.domain.parsing import parse_views
from services.features.domain.sketches import (
    MAX_VALUES,
    SketchKind,
    bucket_middle,
    bucket_of,
    cells_of,
    distinct,
    quantile,
)
from tests.unit.features import reference
from tests.unit.features.reference import Event, frame_of

MINUTE = 60_000_000


def sketch(kind: SketchKind, units: Ints) -> Cells:
    cells, values = cells_of(kind, units)
    nobody = np.zeros(len(units), np.int64)
    return reduced(kind, Cells(nobody, nobody, cells, values))


def estimate(units: Ints) -> float:
    found = sketch("registers", units)
    return float(distinct(found.owners, found.values, 1)[0])


def test_distinct_is_as_near_as_the_library_s_sketch_of_that_size() -> None:
    rng = np.random.default_rng(11)
    ours, theirs = [], []
    for size in (3, 30, 300, 3_000, 30_000):
        for _ in range(40):
            units = rng.choice(2**40, size, replace=False) - 2**39
            library = datasketches.hll_sketch(10, datasketches.tgt_hll_type.HLL_8)
            for unit in units.tolist() if size < 1000 else units[:3000].tolist():
                library.update(unit)
            ours.append(estimate(units) / size - 1)
            if size <= 3000:
                theirs.append(library.get_estimate() / size - 1)
    errors = np.array(ours).reshape(5, 40)
    assert np.abs(errors[0]).max() < 0.01  # few values: nearly exact
    spread = np.sqrt((errors[2:] ** 2).mean(axis=1))
    assert (spread < 0.0325 * 1.35).all()  # 40 draws: 1.35 is three deviations of a deviation
    assert np.abs(errors.mean(axis=1)).max() < 3 * 0.0325 / np.sqrt(40)
    of_library = np.sqrt((np.array(theirs).reshape(4, 40)[2:] ** 2).mean(axis=1))
    assert (spread[:2] < of_library + 0.0325).all()


def test_distinct_without_mixing_would_be_far_off() -> None:
    """Control: neighbouring numbers share their top bits."""
    units = np.arange(10_000)
    assert estimate(units) == pytest.approx(10_000, rel=0.1)
    plain = Cells(units * 0, units * 0, units >> 54, np.ones(10_000, np.int64))
    found = reduced("registers", plain)
    assert distinct(found.owners, found.values, 1)[0] < 10


@given(st.sets(st.integers(-(2**40), 2**40), max_size=60))
def test_distinct_is_the_reference_s_to_the_bit(units: set[int]) -> None:
    assert estimate(np.array(sorted(units), np.int64)) == reference.distinct(units)


@given(st.integers(-(2**41), 2**41))
def test_a_bucket_holds_what_is_near_its_middle(unit: int) -> None:
    bucket = bucket_of(np.array([unit - 1, unit, unit + 1]))
    assert bucket.tolist() == sorted(bucket.tolist())
    middle = float(bucket_middle(bucket)[1])
    assert middle == reference.middle(unit)
    assert abs(middle - unit) <= abs(unit) / 128
    if abs(unit) < 128:
        assert middle == unit


@pytest.mark.parametrize("draw", ["normal", "lognormal", "equal"])
def test_quantiles_keep_their_bound_and_the_library_s_is_no_nearer(draw: str) -> None:
    rng = np.random.default_rng(5)
    numbers = {
        "normal": rng.normal(0, 1e6, 20_000),
        "lognormal": rng.lognormal(10, 3, 20_000),
        "equal": np.full(20_000, 777.0),
    }[draw]
    units = np.rint(numbers).astype(np.int64)
    found, exact = sketch("buckets", units), np.sort(units)
    library = datasketches.kll_doubles_sketch(200)
    library.update(units.astype(np.float64))
    ours, theirs = [], []
    for q in (0.01, 0.25, 0.5, 0.75, 0.9, 0.99, 0.999):
        want = exact[int(q * (len(exact) - 1))]
        got = quantile(found.owners, found.cells, found.values, q, 1)[0]
        assert abs(got - want) <= abs(want) / 128
        scale = max(abs(want), 1)
        ours.append(abs(got - want) / scale)
        theirs.append(abs(library.get_quantile(q) - want) / scale)
    if draw == "lognormal":  # a bound on ranks says little about a long tail
        assert max(ours) < max(theirs)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(-5, 5)), max_size=80),
    st.lists(st.integers(0, 80), max_size=6),
    st.sampled_from(["registers", "buckets", "values"]),
)
def test_cells_are_the_same_whatever_the_runs(
    events: list[tuple[int, int]], cuts: list[int], kind: SketchKind
) -> None:
    slots = np.array([slot for slot, _ in events], np.int64)
    units = np.array([unit for _, unit in events], np.int64)
    held = np.zeros(4, np.int64)
    whole, parted = CellStore(kind), CellStore(kind)
    for store, edges in ((whole, [0, 80]), (parted, [0, *sorted(cuts), 80])):
        for start, end in pairwise(edges):
            cells, values = cells_of(kind, units[start:end])
            tiles = np.zeros(len(cells), np.int64)
            store.add(Cells(slots[start:end], tiles, cells, values), held, -1)
    assert whole.dump(held, -1).frame().equals(parted.dump(held, -1).frame())


def test_a_crowded_tile_stays_crowded_whatever_the_order() -> None:
    units = np.arange(MAX_VALUES + 1)
    whole = uncrowded(sketch("values", units))
    assert len(whole) == 1
    parts = [uncrowded(sketch("values", part)) for part in np.array_split(units, 3)]
    joined = uncrowded(reduced("values", Cells.concatenate(parts)))
    again = uncrowded(reduced("values", Cells.concatenate([joined, *parts])))
    assert joined.frame().equals(whole.frame())
    assert again.frame().equals(whole.frame())
    assert len(uncrowded(sketch("values", units[1:]))) == MAX_VALUES  # control: as many as fit


def view_of(**features: list[str]) -> FeatureView:
    body = {"event": "e", "entity": "k", "scope": "shared", "tile": "1m", "resolution": 1}
    return parse_views({"views": {"v": {**body, "features": features}}})[0]


def test_a_crowded_tile_answers_nothing_until_it_leaves_the_window() -> None:
    view = view_of(x=["top1 2m", "share2 2m", "distinct 2m", "p50 2m"])
    state = ViewState(view)
    crowd = [Event("a", 1, 0, n, (float(n),)) for n in range(MAX_VALUES + 1)]
    state.apply(read_events(view, frame_of(view, crowd)))
    few = [Event("a", MINUTE + 1, 1, n, (7.0,)) for n in range(3)]
    state.apply(read_events(view, frame_of(view, few)))
    both, late = state.answer(["a", "a"], np.array([MINUTE + 2, 2 * MINUTE + 2])).tolist()
    assert np.isnan(both[:2]).all()
    assert both[2] == pytest.approx(1025, rel=0.1)
    assert both[3] == reference.middle(510)
    assert late == [7.0, 1.0, pytest.approx(1.0, rel=0.01), 7.0]


def test_a_row_that_is_given_out_again_has_no_cells_of_before() -> None:
    view = view_of(x=["share1 2m", "distinct 2m"])
    state = ViewState(view)
    state.apply(read_events(view, frame_of(view, [Event("a", 1, 0, 0, (5.0,))])))
    assert state.evict(10 * MINUTE) == 1
    state.apply(read_events(view, frame_of(view, [Event("b", 2, 0, 1, (None,))])))
    assert state.index.find(pl.Series(["b"])).tolist() == [1]
    assert np.isnan(state.answer(["b"], np.array([3]))[0, 0])
    assert state.sketches.memory_bytes() == 0


def test_texts_are_counted_and_nothing_else() -> None:
    view = view_of(x=["distinct 2m", "share1 2m", "count 2m"])
    frame = pl.DataFrame(
        {
            "tenant_id": ["t"] * 5,
            "k": ["a"] * 5,
            "occurred_at_us": [1] * 5,
            "source": [0] * 5,
            "position": range(5),
            "x": ["red", "blue", "red", None, "red"],
        }
    )
    state = ViewState(view)
    read = read_events(view, frame)
    assert read.values.max() < 2**52  # so that a float64 carries it
    assert read.values[0, 0] == 2872476861919614  # it lies on the log, so it never changes
    state.apply(read)
    answer = state.answer(["a"], np.array([2]))[0].tolist()
    assert answer == [pytest.approx(2, rel=0.01), 0.75, 4.0]
    with pytest.raises(Misdeclared, match="it has no sum"):
        read_events(view_of(x=["sum 2m", "distinct 2m"]), frame)


def test_cells_that_no_window_sees_are_left_out_at_the_next_merge() -> None:
    view = view_of(x=["distinct 2m"])
    state, sizes = ViewState(view), []
    for minute in range(50):
        events = [Event("a", minute * MINUTE, 0, n, (float(n),)) for n in range(20)]
        state.apply(read_events(view, frame_of(view, events)), minute * MINUTE)
        sizes.append(state.sketches.memory_bytes())
    assert max(sizes) <= 32 * 20 * 8
