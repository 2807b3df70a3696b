"""The late-arrival model: its signature, a hand-set first version, and how others are trained."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import roc_auc_score
from threadpoolctl import threadpool_limits

from causemesh.errors import Fatal
from examples.flights import export
from services.drift.domain.histograms import reference_histogram

FEATURES = (
    "origin_departures.count_1h",
    "origin_departures.delay_mean_1h",
    "origin_departures.delay_mean_3h",
    "origin_departures.late_mean_3h",
    "carrier_departures.delay_mean_3h",
    "carrier_departures.delay_mean_1d",
    "route_arrivals.delay_mean_1d",
    "route_arrivals.delay_mean_14d",
    "dest_arrivals.delay_mean_3h",
    "tail_arrivals.delay_latest",
    "tail_arrivals.delay_mean_1d",
    "tail_arrivals.age",
    "origin_weather.visibility_miles_latest",
    "origin_weather.precipitation_in_latest",
    "origin_weather.wind_speed_mph_latest",
    "origin_weather.pressure_mb_latest",
    "input.departure_hour",
    "input.weekday",
    "input.distance_miles",
)
"""The vector's columns, in order."""
REQUIRED = ("input.departure_hour", "input.weekday", "input.distance_miles")
"""Columns that a request must bring; the others may be NaN."""
LABEL = {
    "event_type": "flight_landed",
    "request_id": "flight_id",
    "positive": "arrival_delay_minutes >= 15",
}
"""Where the truth comes from, in the shape of ModelVersionRegistered.label."""
TOLERANCE = 1e-4
"""How far an exported score may lie from the trained model's."""

_FIT_SHARE = 0.75
_CHECKED_ROWS = 1_000
# What one sees without any model: about a tenth of the flights at six in the morning arrive late,
# a third of those at eight in the evening.
_INTERCEPT, _SLOPE = -2.9, 0.11
Labels = npt.NDArray[np.bool_]
Times = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Trained:
    """A trained version, ready to be registered.

    auc: on the last quarter by time, of a fit on what came before; reference and metrics: in the
    shape of ModelVersionRegistered; export_difference: the worst seen between the exported scores
    and the trained ones.
    """

    onnx: bytes
    auc: float
    reference: list[dict[str, Any]]
    metrics: list[dict[str, Any]]
    export_difference: float


def baseline_onnx() -> bytes:
    """Version 1: late departures follow the hour of the day, and nothing else is looked at."""
    column = FEATURES.index("input.departure_hour")
    return export.logistic_of_column(len(FEATURES), column, _INTERCEPT, _SLOPE)


def train(vectors: export.Vectors, labels: Labels, occurred_at_us: Times) -> Trained:
    """Fit gradient-boosted trees on vectors float32 [n, len(FEATURES)] that the mesh logged.

    The measure is honest about time: fitted on the first 75%, measured on the rest; the version
    itself is then fitted on all. Same input, same bytes. The reference of the score is of the
    measured part, for scores of rows that were fitted are too sure of themselves. Raises Fatal when
    a part has one class only, or when the export differs from what was trained.
    """
    order = np.argsort(occurred_at_us, kind="stable")
    vectors, labels = vectors[order], labels[order]
    cut = int(len(labels) * _FIT_SHARE)
    if any(len(np.unique(part)) < 2 for part in (labels[:cut], labels[cut:])):
        raise Fatal("the training set needs late and punctual flights on both sides of its cut")
    with ThreadPoolExecutor(2) as pool:  # the fits leave the interpreter's lock alone
        measured = pool.submit(_fitted, vectors[:cut], labels[:cut])
        classifier = pool.submit(_fitted, vectors, labels).result()
        held_out = measured.result().predict_proba(vectors[cut:])[:, 1]
    auc = float(roc_auc_score(labels[cut:], held_out))
    onnx = export.gradient_boosting(classifier, vectors.shape[1])
    difference = _export_difference(classifier, onnx, vectors)
    named = zip(FEATURES, vectors.T, strict=True)
    metrics = {"auc": auc, "rows": float(len(labels)), "positive_share": float(labels.mean())}
    return Trained(
        onnx,
        auc,
        [_reference(name, column) for name, column in [*named, ("score", held_out)]],
        [{"name": name, "value": value} for name, value in metrics.items()],
        difference,
    )


def _reference(column: str, values: npt.NDArray[Any]) -> dict[str, Any]:
    """A training histogram in the shape of ModelVersionRegistered.reference."""
    histogram = reference_histogram(values)
    edges, counts = histogram.edges.tolist(), histogram.counts.tolist()
    return {"column": column, "edges": edges, "counts": counts}


def _fitted(vectors: export.Vectors, labels: Labels) -> Any:
    classifier = HistGradientBoostingClassifier(
        max_iter=150,
        learning_rate=0.06,
        max_leaf_nodes=15,
        min_samples_leaf=100,
        l2_regularization=1.0,
        early_stopping=False,
        random_state=2013,
    )
    # One thread: ten times faster than threads that wait for cores which others use.
    with threadpool_limits(1, user_api="openmp"):
        return classifier.fit(vectors, labels.astype(np.int64))


def _export_difference(classifier: Any, onnx: bytes, vectors: export.Vectors) -> float:
    """The worst difference over rows from all of the time. Raises Fatal above the tolerance."""
    rows = np.linspace(0, len(vectors) - 1, min(_CHECKED_ROWS, len(vectors))).astype(np.int64)
    trained = classifier.predict_proba(vectors[rows])[:, 1]
    worst = float(np.abs(export.score(onnx, vectors[rows]) - trained).max())
    if not worst < TOLERANCE:
        raise Fatal(f"the exported model is off by {worst:.2g}, more than {TOLERANCE}: keep it")
    return worst
