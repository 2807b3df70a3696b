"""Settings, alerts and when to retrain."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from causemesh.errors import Misdeclared
from services.drift.domain.detectors import (
    Alert,
    DriftConfig,
    Threshold,
    judge,
    parse_drift,
    retrain_due,
)
from services.drift.domain.reports import Detector, Report

DOCUMENT = """
label_wait_hours: 48
minimum_records: 100
alerts:
  psi: {above: 0.25}
  score_psi: {above: 0.2}
  auc: {below: 0.65}
  label_coverage: {below: 0.5}
retrain_after_alert_days: 3
"""


def config() -> DriftConfig:
    return parse_drift(yaml.safe_load(DOCUMENT))


def report(
    detector: Detector, value: float, records: int = 100, column: str | None = None
) -> Report:
    return Report("2013-03-01", detector, column, value, records)


def alerts(*days: int, detector: Detector = "auc", month: int = 3) -> list[Alert]:
    return [Alert(f"2013-{month:02}-{day:02}", detector, None, 0.6, 0.65) for day in days]


def test_a_document_becomes_a_config() -> None:
    assert config() == DriftConfig(
        alerts=(
            Threshold("psi", "above", 0.25),
            Threshold("score_psi", "above", 0.2),
            Threshold("auc", "below", 0.65),
            Threshold("label_coverage", "below", 0.5),
        ),
        label_wait_hours=48,
        minimum_records=100,
        retrain_after_alert_days=3,
    )


def test_defaults() -> None:
    assert parse_drift({}) == DriftConfig((), 24, 200, None)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (None, "expected keys"),
        ({"alert": {}}, "unknown key 'alert'; known: label_wait_hours"),
        ({"alerts": ["psi"]}, "must map a detector"),
        (
            {"alerts": {"kl": {"above": 1}}},
            "unknown detector 'kl'; known: psi, score_psi, auc, accuracy, label_coverage",
        ),
        ({"alerts": {"psi": 0.25}}, "write {above: number}"),
        ({"alerts": {"psi": {"over": 0.25}}}, "write {above: number}"),
        ({"alerts": {"psi": {"above": 0.25, "below": 0.1}}}, "write {above: number}"),
        ({"alerts": {"psi": {"above": "high"}}}, "write {above: number}"),
        ({"alerts": {"psi": {"above": float("nan")}}}, "write {above: number}"),
        ({"minimum_records": 0}, "minimum_records must be a whole number from 1"),
        ({"minimum_records": True}, "minimum_records must be"),
        ({"label_wait_hours": -1}, "label_wait_hours must be a whole number from 0"),
        ({"label_wait_hours": "24h"}, "label_wait_hours must be"),
        ({"retrain_after_alert_days": 3}, "needs an alert on one of auc, score_psi"),
        (
            {"alerts": {"auc": {"below": 0.6}}, "retrain_after_alert_days": 0},
            "retrain_after_alert_days must be a whole number from 1",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(document: Any, message: str) -> None:
    with pytest.raises(Misdeclared, match=message):
        parse_drift(document)


def test_reports_beyond_their_threshold_alert() -> None:
    reports = [
        report("psi", 0.26, column="a.x"),
        report("psi", 0.25, column="a.y"),
        report("score_psi", 0.1),
        report("auc", 0.64),
        report("accuracy", 0.0),
        report("label_coverage", 0.5),
    ]
    assert judge(reports, config()) == [
        Alert("2013-03-01", "psi", "a.x", 0.26, 0.25),
        Alert("2013-03-01", "auc", None, 0.64, 0.65),
    ]


def test_few_records_never_alert() -> None:
    assert judge([report("auc", 0.1, records=99)], config()) == []
    assert len(judge([report("auc", 0.1, records=100)], config())) == 1


@pytest.mark.parametrize(
    ("history", "due"),
    [
        (alerts(8, 9, 10), True),
        (alerts(10, 8, 9), True),
        (alerts(9, 10), False),
        (alerts(7, 8, 10), False),
        (alerts(7, 8, 9), False),
        (alerts(8, 9) + alerts(10, detector="score_psi"), True),
        (alerts(8, 9) + alerts(10, detector="psi"), False),
        (alerts(8, 9, 10) + alerts(10, detector="score_psi"), True),
        (alerts(7, 8, 9, 10), False),
        (alerts(5, 6, 7, 8, 9, 10), True),
        ([], False),
    ],
)
def test_a_run_of_alert_days_asks_for_retraining(history: list[Alert], due: bool) -> None:
    assert retrain_due(history, config(), day="2013-03-10") is due


def test_a_run_goes_over_the_end_of_a_month() -> None:
    history = alerts(27, 28, month=2) + alerts(1)
    assert retrain_due(history, config(), day="2013-03-01")


def test_retraining_is_only_asked_for_when_set() -> None:
    never = DriftConfig(config().alerts)
    assert not retrain_due(alerts(8, 9, 10), never, day="2013-03-10")
