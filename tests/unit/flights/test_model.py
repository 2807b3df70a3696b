"""The example's views, its hand-set model, and what training exports."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import polars as pl
import pytest
import yaml

from causemesh.catalogue import Catalogue
from causemesh.errors import Fatal
from examples.flights import dataset, export, model, offline
from examples.flights.dataset import Replay, load
from examples.flights.model import FEATURES, REQUIRED, TOLERANCE, baseline_onnx, train
from services.features.domain.feature_store import FeatureStore

PROJECT = Path(dataset.__file__).parent
HOUR = FEATURES.index("input.departure_hour")


@pytest.fixture(scope="module")
def replay() -> Replay:
    return load(1)


def document(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((PROJECT / name).read_text())
    return content


def sample(rows: int, seed: int = 1) -> tuple[export.Vectors, model.Labels, model.Times]:
    """Vectors with holes in all but the required columns; late when the first is large."""
    rng = np.random.default_rng(seed)
    vectors = rng.normal(0, 20, (rows, len(FEATURES))).astype(np.float32)
    labels = np.asarray(vectors[:, 0] + rng.normal(0, 10, rows) > 5)
    optional = len(FEATURES) - len(REQUIRED)
    vectors[:, 1:optional][rng.random((rows, optional - 1)) < 0.3] = np.nan
    return vectors, labels, np.arange(rows, dtype=np.int64)


def test_views_define_every_feature_of_the_vector() -> None:
    views = offline.views()
    computed = [name for name in FEATURES if name not in REQUIRED]
    store = FeatureStore(views)
    assert set(computed) == set(store.feature_names)
    assert len(set(FEATURES)) == len(FEATURES)
    assert {view.placement for view in views} == {"broadcast", "rekeyed"}
    assert [v.name for v in views if v.scope == "tenant"] == ["carrier_departures"]


def test_views_read_columns_that_their_events_have() -> None:
    catalogue = Catalogue.load([PROJECT])
    for view in offline.views():
        record = catalogue.event_types[view.event_type].record
        assert set(view.entity) <= {field["name"] for field in record["fields"]}


def test_other_files_name_what_exists() -> None:
    catalogue = Catalogue.load([PROJECT])
    meters = document("billing.yaml")["meters"]
    assert set(meters) == {"predictions", "departures"}
    for meter in meters.values():
        assert "billing" in catalogue.topic(meter["topic"]).consumers
    assert document("agents.yaml")["workflows"]["review"]["model"] == dataset.MODEL
    assert set(document("drift.yaml")["alerts"]) == {"psi", "score_psi", "auc", "label_coverage"}


def test_baseline_looks_at_the_hour_only() -> None:
    vectors = np.full((3, len(FEATURES)), np.nan, np.float32)
    vectors[:, HOUR] = (6, 12.5, 20)
    scores = export.score(baseline_onnx(), vectors)
    expected = 1 / (1 + np.exp(2.9 - 0.11 * vectors[:, HOUR]))
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected, rtol=1e-6)
    np.testing.assert_array_equal(export.score(baseline_onnx(), np.nan_to_num(vectors)), scores)
    vectors[:, HOUR] = np.nan
    assert np.isnan(export.score(baseline_onnx(), vectors)).all()


def test_training_exports_what_was_trained() -> None:
    vectors, labels, times = sample(2_000)
    trained = train(vectors, labels, times)
    assert trained.export_difference < TOLERANCE
    assert trained.auc > 0.85
    assert {m["name"]: m["value"] for m in trained.metrics}["rows"] == 2_000
    assert train(vectors, labels, times).onnx == trained.onnx
    shuffled = np.random.default_rng(2).permutation(2_000)
    again = train(vectors[shuffled], labels[shuffled], times[shuffled])
    assert again.onnx == trained.onnx


def test_the_measure_uses_the_end_of_time_only() -> None:
    """Labels that turn round in the last quarter: what was learnt before is worse than chance."""
    vectors, labels, times = sample(2_000)
    labels[1_500:] = ~labels[1_500:]
    assert train(vectors, labels, times).auc < 0.2


def test_an_export_that_differs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = export.score
    monkeypatch.setattr(export, "score", lambda onnx, vectors: honest(onnx, vectors) + 1e-3)
    with pytest.raises(Fatal, match="off by"):
        train(*sample(1_000))


def test_one_class_is_refused() -> None:
    vectors, labels, times = sample(1_000)
    labels[750:] = True
    with pytest.raises(Fatal, match="both sides"):
        train(vectors, labels, times)


@pytest.mark.parametrize("rounded", [True, False])
def test_neighbouring_numbers_stay_apart(rounded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their threshold is no float32; left to the converter, it lands on the upper number."""
    if not rounded:
        monkeypatch.setattr(export, "round_thresholds", lambda classifier: None)
    lower = np.nextafter(np.float32(1), np.float32(2))  # odd: the tie goes to the upper one
    upper = np.nextafter(lower, np.float32(2))
    vectors, _, _ = sample(1_000)
    labels = np.arange(1_000) % 2 == 0
    vectors[:, 0] = np.where(labels, upper, lower)
    classifier = model._fitted(vectors, labels)
    trained = classifier.predict_proba(vectors)[:, 1]
    exported = export.score(export.gradient_boosting(classifier, len(FEATURES)), vectors)
    worst = np.abs(exported - trained).max()
    assert (worst < TOLERANCE) == rounded


def test_reference_fits_its_record() -> None:
    vectors, labels, times = sample(1_000)
    vectors[:, 3] = np.where(vectors[:, 3] > 30, vectors[:, 3], 0)  # mostly zero, like rain
    reference = train(vectors, labels, times).reference
    assert [entry["column"] for entry in reference] == [*FEATURES, "score"]
    for entry in reference:
        assert len(entry["counts"]) == len(entry["edges"]) + 2
        assert np.all(np.diff(entry["edges"]) > 0)
        assert sum(entry["counts"]) == (250 if entry["column"] == "score" else 1_000)
    assert all(count > 0 for count in reference[3]["counts"][:-1])
    assert reference[1]["counts"][-1] == int(np.isnan(vectors[:, 1]).sum()) > 0


def test_vectors_know_what_landed_before_their_minute(replay: Replay) -> None:
    """A plane's newest delay, and the departures of an hour, against a look at all events."""
    vectors = offline.logged_vectors(replay)
    assert vectors.height == replay.requests.height
    places = {name: FEATURES.index(name) for name in FEATURES}
    planes = dict(replay.departed.select("flight_id", "tail").iter_rows())
    landed = by(replay.landed, "tail", "arrival_delay_minutes")
    departed = by(replay.departed, "origin", "departure_delay_minutes")
    compared = 0
    for row in vectors[2_000::200].iter_rows(named=True):
        if row["request_id"] not in planes:
            continue
        at = datetime.fromtimestamp(row["occurred_at_us"] / 1e6, ZoneInfo("UTC"))
        seen = [delay for when, delay in landed.get(planes[row["request_id"]], []) if when < at]
        latest = row["vector"][places["tail_arrivals.delay_latest"]]
        age = row["vector"][places["tail_arrivals.age"]]
        if age < timedelta(days=7).total_seconds():
            assert latest == seen[-1]
            compared += 1
        origin = row["request_id"][-3:]
        hour = [d for when, d in departed[origin] if at - timedelta(hours=1) <= when < at]
        if at.minute % 5 == 0:
            assert row["vector"][places["origin_departures.count_1h"]] == len(hour)
    assert compared > 30


def by(frame: pl.DataFrame, key: str, value: str) -> dict[str, list[tuple[datetime, int]]]:
    found: dict[str, list[tuple[datetime, int]]] = {}
    for name, at, number in frame.select(key, "occurred_at", value).iter_rows():
        found.setdefault(name, []).append((at, number))
    return found


def test_the_model_learns_something(replay: Replay) -> None:
    """More than the hour of the day tells; and a month is enough to see it."""
    trained, afterwards = offline.check(replay, datetime(2013, 1, 22, tzinfo=ZoneInfo("UTC")))
    assert trained.export_difference < TOLERANCE
    assert 0.65 < afterwards < 0.85
