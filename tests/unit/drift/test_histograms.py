"""Bins, references and the counting of predictions."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from causemesh.errors import Misdeclared, Poison
from services.drift.domain.histograms import (
    COUNTS,
    Histogram,
    Signature,
    bin_counts,
    bin_indexes,
    count_batch,
    reference_histogram,
    vectors,
)

NAN, INF = float("nan"), float("inf")
DOUBLES = st.floats(allow_nan=True, allow_infinity=True)
SAMPLES = hnp.arrays(np.float64, st.integers(0, 200), elements=DOUBLES)
DAY0 = datetime(2013, 1, 1, tzinfo=UTC)


def histogram(*edges: float) -> Histogram:
    return Histogram(np.array(edges), np.ones(len(edges) + 2, np.int64))


SIGNATURE = Signature(
    "late",
    2,
    ("a.x", "a.y"),
    {"a.x": histogram(0.0, 1.0), "a.y": histogram(), "score": histogram(0.5)},
)


def predictions(rows: Sequence[dict[str, Any]]) -> pl.DataFrame:
    """PredictionMade columns; each row overrides a good prediction of SIGNATURE."""
    good = {
        "model": "late",
        "version": 2,
        "outcome": "predicted",
        "score": 0.4,
        "vector": np.array([0.5, 7.0], "<f4").tobytes(),
        "occurred_at": DAY0,
    }
    schema: dict[str, Any] = {
        "model": pl.String,
        "version": pl.Int32,
        "outcome": pl.String,
        "score": pl.Float64,
        "vector": pl.Binary,
        "occurred_at": pl.Datetime("us", "UTC"),
    }
    return pl.DataFrame([{**good, **row} for row in rows], schema=schema)


def vector(*values: float) -> bytes:
    return np.array(values, "<f4").tobytes()


def test_bins_are_right_closed_and_nan_has_the_last() -> None:
    edges = np.array([0.0, 1.0])
    values = np.array([-INF, -1, 0.0, 1e-9, 1.0, 1.1, INF, NAN])
    assert bin_indexes(values, edges).tolist() == [0, 0, 0, 1, 1, 2, 2, 3]
    assert bin_counts(values, edges).tolist() == [3, 2, 2, 1]
    assert bin_counts(np.array([NAN, 3.0]), np.array([])).tolist() == [1, 1]


def test_few_distinct_values_get_an_edge_between_neighbours() -> None:
    reference = reference_histogram(np.array([3.0, 1.0, 2.0, 1.0, NAN]), bins=3)
    assert reference.edges.tolist() == [1.5, 2.5]
    assert reference.counts.tolist() == [2, 1, 1, 1]


def test_a_constant_column_gets_no_edges() -> None:
    for values, counts in (([5.0] * 4, [4, 0]), ([NAN, NAN], [0, 2]), ([], [0, 0])):
        reference = reference_histogram(np.array(values, np.float64))
        assert (reference.edges.tolist(), reference.counts.tolist()) == ([], counts)


def test_quantile_bins_hold_equal_shares() -> None:
    values = np.random.default_rng(1).permutation(1000).astype(np.float64)
    assert reference_histogram(values).counts.tolist() == [100] * 10 + [0]


def test_a_value_that_fills_many_quantiles_gives_one_edge() -> None:
    values = np.concatenate([np.zeros(900), np.arange(1, 101)])
    reference = reference_histogram(values)
    assert reference.edges.tolist() == [0.5]
    assert reference.counts.tolist() == [900, 100, 0]


def test_the_bin_is_the_same_in_float32() -> None:
    values = np.arange(1, 101) / 100  # float32(0.1) > 0.1
    reference = reference_histogram(values)
    as_sent = values.astype(np.float32)
    assert bin_counts(as_sent, reference.edges).tolist() == reference.counts.tolist()
    on_values = np.sort(values)[9:99:10]  # edges that lie on values, as plain quantiles do
    assert bin_counts(as_sent, on_values).tolist() != bin_counts(values, on_values).tolist()


@settings(deadline=None)
@given(SAMPLES, st.integers(1, 12))
@example(np.array([0.0, 5e-324, 1e-323, 1.5e-323]), 10)
@example(np.array([1.0, np.nextafter(1.0, 2), np.nextafter(1.0, 0)]), 10)
@example(np.array([-1.7976931348623157e308, 1.7976931348623157e308]), 2)
def test_a_reference_is_well_formed_and_counts_its_sample(values: Any, bins: int) -> None:
    reference = reference_histogram(values, bins)  # Histogram refuses edges that do not rise
    assert len(reference.edges) <= bins - 1
    assert reference.counts.sum() == len(values)
    assert reference.counts[-1] == np.isnan(values).sum()
    finite = values[np.isfinite(values)]
    if 0 < len(np.unique(finite)) <= bins:
        assert (bin_counts(finite, reference.edges)[:-1] > 0).all()
        assert len(reference.edges) == len(np.unique(finite)) - 1


@settings(deadline=None)
@given(SAMPLES, st.integers(0, 200))
def test_counts_do_not_depend_on_chunks(values: Any, cut: int) -> None:
    edges = reference_histogram(values).edges
    halves = bin_counts(values[:cut], edges) + bin_counts(values[cut:], edges)
    assert halves.tolist() == bin_counts(values, edges).tolist()


@pytest.mark.parametrize(
    ("edges", "counts"),
    [
        ([1.0, 1.0], [0] * 4),
        ([2.0, 1.0], [0] * 4),
        ([NAN], [0] * 3),
        ([INF], [0] * 3),
        ([1.0], [1, 1]),
        ([1.0], [1, 1, -1]),
    ],
)
def test_malformed_histograms_are_refused(edges: list[float], counts: list[int]) -> None:
    with pytest.raises(Misdeclared):
        Histogram(np.array(edges), np.array(counts))
    Histogram(np.array([1.0, 2.0]), np.array([0, 1, 2, 3]))


def test_no_bins_are_refused() -> None:
    with pytest.raises(Misdeclared, match="1 bin or more"):
        reference_histogram(np.array([1.0]), 0)


def test_vectors_are_read_at_once() -> None:
    matrix = vectors(pl.Series([vector(1, 2), vector(3, NAN)]), 2)
    assert matrix.dtype == np.float32
    np.testing.assert_array_equal(matrix, np.array([[1, 2], [3, NAN]], np.float32))
    assert vectors(pl.Series([], dtype=pl.Binary), 2).shape == (0, 2)


def test_vectors_of_a_wrong_length_are_poison() -> None:
    # together as long as three good ones: only a check of each row can see it
    column = pl.Series([vector(1, 2), vector(3), vector(4, 5, 6), None])
    with pytest.raises(Poison) as refused:
        vectors(column, 2)
    assert list(refused.value.rows) == [1, 2, 3]
    assert refused.value.rows[1] == "the vector has 4 bytes; 2 features need 8"


def test_a_batch_is_counted_by_day_column_and_bin() -> None:
    frame = predictions(
        [
            {"occurred_at": DAY0 + timedelta(days=1), "vector": vector(2, 2), "score": 0.9},
            {"vector": vector(1, NAN)},
            {"occurred_at": DAY0 + timedelta(hours=23, minutes=59), "vector": vector(0.5, INF)},
            {"occurred_at": DAY0 - timedelta(microseconds=1), "score": None},
        ]
    )
    counted = count_batch(frame, SIGNATURE)
    assert counted.schema == COUNTS
    assert counted.rows() == [
        ("late", 2, "2012-12-31", "a.x", 1, 1),
        ("late", 2, "2012-12-31", "a.y", 0, 1),
        ("late", 2, "2012-12-31", "score", 2, 1),
        ("late", 2, "2013-01-01", "a.x", 1, 2),
        ("late", 2, "2013-01-01", "a.y", 0, 1),
        ("late", 2, "2013-01-01", "a.y", 1, 1),
        ("late", 2, "2013-01-01", "score", 0, 2),
        ("late", 2, "2013-01-02", "a.x", 2, 1),
        ("late", 2, "2013-01-02", "a.y", 0, 1),
        ("late", 2, "2013-01-02", "score", 1, 1),
    ]


def test_only_predictions_of_the_version_are_counted() -> None:
    others: list[dict[str, Any]] = [
        {"model": "early"},
        {"version": 1},
        {"outcome": "failed", "vector": b""},
    ]
    others += [
        {"outcome": outcome, "score": None, "vector": b""} for outcome in ("expired", "shed")
    ]
    assert count_batch(predictions(others), SIGNATURE).equals(pl.DataFrame(schema=COUNTS))
    assert count_batch(predictions([]), SIGNATURE).equals(pl.DataFrame(schema=COUNTS))
    assert count_batch(predictions([*others, {}]), SIGNATURE)["count"].to_list() == [1, 1, 1]


def test_poison_names_rows_of_the_frame() -> None:
    frame = predictions(
        [{"version": 1}, {}, {"outcome": "failed", "vector": b""}, {"vector": b"x"}]
    )
    with pytest.raises(Poison) as refused:
        count_batch(frame, SIGNATURE)
    assert list(refused.value.rows) == [3]
    assert count_batch(frame[:3], SIGNATURE)["count"].sum() == 3


def test_columns_without_a_reference_are_not_counted() -> None:
    signature = Signature("late", 2, ("a.x", "a.y"), {"a.y": histogram(1.0)})
    assert count_batch(predictions([{}]), signature)["column"].to_list() == ["a.y"]
    none = Signature("late", 2, ("a.x", "a.y"), {})
    assert count_batch(predictions([{}]), none).equals(pl.DataFrame(schema=COUNTS))


ROWS = st.fixed_dictionaries(
    {
        "version": st.sampled_from([1, 2, 2, 2]),
        "outcome": st.sampled_from(["predicted", "predicted", "failed"]),
        "score": st.none() | st.floats(0, 1),
        "vector": st.tuples(*[st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0, NAN])] * 2).map(
            lambda pair: vector(*pair)
        ),
        "occurred_at": st.integers(-100, 100).map(lambda hour: DAY0 + timedelta(hours=hour)),
    }
)


@settings(deadline=None, max_examples=50)
@given(st.lists(ROWS, max_size=30), st.integers(0, 30))
def test_batches_add_up_to_the_whole(rows: list[dict[str, Any]], cut: int) -> None:
    frame = predictions(rows)
    keys = ["model", "version", "day", "column", "bin"]
    halves = pl.concat([count_batch(part, SIGNATURE) for part in (frame[:cut], frame[cut:])])
    summed = halves.group_by(keys).agg(pl.col("count").sum()).sort(keys)
    assert summed.equals(count_batch(frame, SIGNATURE).sort(keys))


def test_a_signature_is_read_from_its_record() -> None:
    record = {
        "model": "late",
        "version": 3,
        "features": ["a.x"],
        "reference": [
            {"column": "a.x", "edges": [0.5], "counts": [1, 2, 3]},
            {"column": "score", "edges": [], "counts": [6, 0]},
        ],
    }
    signature = Signature.from_record(record)
    assert (signature.model, signature.version, signature.features) == ("late", 3, ("a.x",))
    assert signature.reference["a.x"].counts.tolist() == [1, 2, 3]
    assert signature.reference["score"].edges.dtype == np.float64


def test_a_reference_of_no_column_is_refused() -> None:
    with pytest.raises(Misdeclared, match=r"a\.z"):
        Signature("late", 1, ("a.x",), {"a.z": histogram()})
    with pytest.raises(Misdeclared, match="no feature is called"):
        Signature("late", 1, ("score",), {})
