"""A day's reports, and the whole way from predictions to an alert."""

from __future__ import annotations

from datetime import UTC, datetime

import numpy as np
import polars as pl
import pytest

from causemesh.errors import Misdeclared
from services.drift.domain.detectors import judge, parse_drift
from services.drift.domain.histograms import Histogram, Signature, count_batch, reference_histogram
from services.drift.domain.measures import psi
from services.drift.domain.reports import Report, daily_reports

DAY = "2013-09-01"
REFERENCE = {
    "b": Histogram(np.array([0.0]), np.array([10, 30, 0])),
    "score": Histogram(np.array([0.5]), np.array([20, 20, 0])),
    "a": Histogram(np.array([]), np.array([40, 0])),
    "unseen": Histogram(np.array([]), np.array([40, 0])),
}
COUNTS = pl.DataFrame(
    [("score", 0, 3), ("b", 1, 2), ("a", 0, 4), ("score", 1, 1), ("b", 0, 1), ("b", 1, 1)],
    schema={"column": pl.String, "bin": pl.Int32, "count": pl.Int64},
    orient="row",
)
SCORED = pl.DataFrame(
    {
        "score": [0.9, 0.2, 0.4, 0.6, None, float("nan"), 0.3],
        "positive": [True, False, True, False, True, False, None],
    }
)


def test_a_days_reports_in_order() -> None:
    score_psi = psi(np.array([20, 20, 0]), np.array([3, 1, 0]))
    assert daily_reports(DAY, COUNTS, SCORED, REFERENCE) == [
        Report(DAY, "psi", "a", 0.0, 4),
        Report(DAY, "psi", "b", 0.0, 4),
        Report(DAY, "score_psi", None, score_psi, 4),
        Report(DAY, "auc", None, 0.75, 4),
        Report(DAY, "accuracy", None, 0.5, 4),
        Report(DAY, "label_coverage", None, 6 / 7, 7),
    ]


def test_the_order_of_rows_and_references_does_not_matter() -> None:
    turned = dict(reversed(REFERENCE.items()))
    expected = daily_reports(DAY, COUNTS, SCORED, REFERENCE)
    assert daily_reports(DAY, COUNTS.reverse(), SCORED.reverse(), turned) == expected


def test_what_is_undefined_is_not_reported() -> None:
    unlabelled = SCORED.with_columns(positive=pl.lit(None, pl.Boolean))
    assert daily_reports(DAY, COUNTS.clear(), unlabelled, REFERENCE) == [
        Report(DAY, "label_coverage", None, 0.0, 7)
    ]
    assert daily_reports(DAY, COUNTS.clear(), SCORED.clear(), REFERENCE) == []


@pytest.mark.parametrize(("column", "place"), [("c", 0), ("b", 3), ("b", -1)])
def test_counts_of_another_reference_are_refused(column: str, place: int) -> None:
    strange = COUNTS.vstack(pl.DataFrame([(column, place, 1)], schema=COUNTS.schema, orient="row"))
    with pytest.raises(Misdeclared, match="another version's edges"):
        daily_reports(DAY, strange, SCORED, REFERENCE)


def predictions(values: np.ndarray, scores: np.ndarray) -> pl.DataFrame:
    matrix = values.astype("<f4")
    return pl.DataFrame(
        {
            "model": ["late"] * len(values),
            "version": pl.Series([1] * len(values), dtype=pl.Int32),
            "outcome": ["predicted"] * len(values),
            "score": scores,
            "vector": [row.tobytes() for row in matrix],
            "occurred_at": [datetime(2013, 9, 1, 12, tzinfo=UTC)] * len(values),
        }
    )


@pytest.mark.parametrize(("shift", "alerted"), [(0.0, []), (1.0, ["psi", "score_psi", "auc"])])
def test_a_shifted_and_decayed_model_alerts_and_a_steady_one_does_not(
    shift: float, alerted: list[str]
) -> None:
    random = np.random.default_rng(7)
    training = random.normal(size=(5000, 2))
    logistic = 1 / (1 + np.exp(-training[:, 0]))
    reference = {
        "v.x": reference_histogram(training[:, 0]),
        "v.y": reference_histogram(training[:, 1]),
        "score": reference_histogram(logistic),
    }
    today = random.normal(size=(2000, 2))
    today[:, 0] += shift
    scores = 1 / (1 + np.exp(-today[:, 0]))
    positive = today[:, 0] + random.normal(size=2000) * (0.5 + 20 * shift) > 0
    signature = Signature("late", 1, ("v.x", "v.y"), reference)
    counts = count_batch(predictions(today, scores), signature)
    scored = pl.DataFrame({"score": scores, "positive": positive})
    config = parse_drift(
        {"alerts": {"psi": {"above": 0.25}, "score_psi": {"above": 0.2}, "auc": {"below": 0.65}}}
    )
    found = judge(daily_reports(DAY, counts, scored, reference), config)
    assert [alert.detector for alert in found] == alerted
    assert {alert.column for alert in found} <= {"v.x", None}
