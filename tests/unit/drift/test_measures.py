"""The measures against their definitions and against scikit-learn."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import accuracy_score, roc_auc_score

from causemesh.errors import Misdeclared
from services.drift.domain.measures import accuracy, auc, label_coverage, psi

COUNTS = hnp.arrays(np.int64, 6, elements=st.integers(0, 1000))
# few distinct values, so that ties are the rule
TIED = st.integers(0, 5).map(lambda tenths: tenths / 10)
SCORED = st.lists(st.tuples(TIED | st.floats(0, 1), st.booleans()), min_size=2, max_size=60)


def counts(*numbers: int) -> Any:
    return np.array(numbers, np.int64)


def test_psi_is_the_known_sum_on_large_samples() -> None:
    p, q = np.array([0.2, 0.3, 0.5]), np.array([0.4, 0.4, 0.2])
    expected = float(np.sum((p - q) * np.log(p / q)))
    assert psi(
        counts(4 * 10**6, 4 * 10**6, 2 * 10**6), counts(2 * 10**6, 3 * 10**6, 5 * 10**6)
    ) == (pytest.approx(expected, rel=1e-5))


def test_psi_smooths_with_one_record_of_the_smaller_sample() -> None:
    p = np.array([2 + 1, 8 + 1]) / (10 + 2)
    q = np.array([0 / 10 + 1, 40 / 4 + 1]) / (10 + 2)
    expected = float(np.sum((p - q) * np.log(p / q)))
    assert psi(counts(0, 40), counts(2, 8)) == pytest.approx(expected)
    assert psi(counts(100, 0), counts(0, 100)) < math.inf


@settings(deadline=None)
@given(COUNTS, COUNTS)
def test_psi_is_never_negative_and_symmetric(reference: Any, current: Any) -> None:
    value = psi(reference, current)
    if reference.sum() and current.sum():
        assert value >= 0
        assert value == pytest.approx(psi(current, reference))
    else:
        assert math.isnan(value)


@settings(deadline=None)
@given(COUNTS.filter(lambda c: c.sum() > 0), st.integers(1, 1000))
def test_psi_of_proportional_counts_is_0(reference: Any, factor: int) -> None:
    assert psi(reference, reference * factor) == pytest.approx(0, abs=1e-15)
    moved = reference.copy()
    moved[np.argmax(moved)] += moved.sum()
    if np.count_nonzero(reference) > 1:
        assert psi(reference, moved * factor) > 1e-9


def test_psi_needs_the_same_bins() -> None:
    with pytest.raises(Misdeclared, match="2 bins cannot be compared with 3"):
        psi(counts(1, 2, 3), counts(1, 2))


def test_auc_counts_a_tie_as_half() -> None:
    labels = np.array([True, False, True, False])
    assert auc(np.array([0.9, 0.1, 0.5, 0.5]), labels) == (1 + 1 + 1 + 0.5) / 4
    assert auc(np.full(4, 0.3), labels) == 0.5
    assert auc(np.array([0.1, 0.9, 0.1, 0.9]), labels) == 0.0


@settings(deadline=None, max_examples=200)
@given(SCORED)
def test_auc_is_scikit_learns(rows: list[tuple[float, bool]]) -> None:
    scores, labels = np.array([r[0] for r in rows]), np.array([r[1] for r in rows])
    if labels.all() or not labels.any():
        assert math.isnan(auc(scores, labels))
    else:
        assert auc(scores, labels) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)


@settings(deadline=None)
@given(SCORED, TIED)
def test_accuracy_is_scikit_learns(rows: list[tuple[float, bool]], threshold: float) -> None:
    scores, labels = np.array([r[0] for r in rows]), np.array([r[1] for r in rows])
    expected = accuracy_score(labels, scores >= threshold)
    assert accuracy(scores, labels, threshold) == pytest.approx(expected)


def test_a_score_on_the_threshold_is_positive() -> None:
    assert accuracy(np.array([0.5, 0.49]), np.array([True, False])) == 1.0
    assert accuracy(np.array([0.5, 0.49]), np.array([False, False])) == 0.5


def test_what_is_undefined_is_nan() -> None:
    empty = np.array([], np.float64)
    assert math.isnan(auc(empty, empty.astype(bool)))
    assert math.isnan(accuracy(empty, empty.astype(bool)))
    assert math.isnan(label_coverage(0, 0))
    assert label_coverage(1, 4) == 0.25
