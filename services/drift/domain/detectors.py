"""Which measures alert and when to retrain, as YAML.

```yaml
label_wait_hours: 24           # how long after a day its labels are waited for (default 24)
minimum_records: 200           # a measure of fewer records never alerts (default 200)
alerts:
  psi: {above: 0.25}
  score_psi: {above: 0.2}
  auc: {below: 0.65}
  label_coverage: {below: 0.5}
retrain_after_alert_days: 3    # consecutive days with an auc or score_psi alert; absent: never
```
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any, Literal

from causemesh.errors import Misdeclared
from services.drift.domain.reports import DETECTORS, Detector, Report

Side = Literal["above", "below"]

RETRAIN_DETECTORS: frozenset[Detector] = frozenset(["auc", "score_psi"])
"""Those whose alerts call for retraining: a drifted input alone may do the model no harm."""

_KEYS = ("label_wait_hours", "minimum_records", "alerts", "retrain_after_alert_days")


@dataclass(frozen=True)
class Threshold:
    """A detector alerts when its value is strictly `above` or strictly `below` this one."""

    detector: Detector
    side: Side
    value: float

    def crossed(self, value: float) -> bool:
        """Whether a measured value alerts."""
        return value > self.value if self.side == "above" else value < self.value


@dataclass(frozen=True)
class DriftConfig:
    """A project's drift settings; `retrain_after_alert_days` None means never."""

    alerts: tuple[Threshold, ...]
    label_wait_hours: int = 24
    minimum_records: int = 200
    retrain_after_alert_days: int | None = None


@dataclass(frozen=True)
class Alert:
    """A report that crossed its threshold."""

    day: str
    detector: Detector
    column: str | None
    value: float
    threshold: float


def parse_drift(document: object) -> DriftConfig:
    """Read a project's drift.yaml as in the module's example, or raise Misdeclared."""
    if not isinstance(document, Mapping):
        raise Misdeclared(f"drift: expected keys such as `alerts`, not {document!r}")
    unknown = sorted(map(str, set(document) - set(_KEYS)))
    if unknown:
        raise Misdeclared(f"drift: unknown key {unknown[0]!r}; known: {', '.join(_KEYS)}")
    alerts = _alerts(document.get("alerts", {}))
    days = document.get("retrain_after_alert_days")
    if days is not None and not RETRAIN_DETECTORS & {alert.detector for alert in alerts}:
        raise Misdeclared(
            "drift: retrain_after_alert_days needs an alert on one of "
            f"{', '.join(sorted(RETRAIN_DETECTORS))}"
        )
    return DriftConfig(
        alerts,
        _whole("label_wait_hours", document.get("label_wait_hours", 24), minimum=0),
        _whole("minimum_records", document.get("minimum_records", 200), minimum=1),
        None if days is None else _whole("retrain_after_alert_days", days, minimum=1),
    )


def _alerts(body: object) -> tuple[Threshold, ...]:
    if not isinstance(body, Mapping):
        raise Misdeclared("drift: `alerts` must map a detector to {above: number} or {below: ...}")
    return tuple(_threshold(detector, limit) for detector, limit in body.items())


def _threshold(detector: Any, limit: object) -> Threshold:
    if detector not in DETECTORS:
        raise Misdeclared(f"drift: unknown detector {detector!r}; known: {', '.join(DETECTORS)}")
    sides: list[tuple[Any, Any]] = list(limit.items()) if isinstance(limit, Mapping) else []
    if len(sides) != 1 or sides[0][0] not in ("above", "below") or not _is_number(sides[0][1]):
        raise Misdeclared(
            f"drift: alert {detector}: write {{above: number}} or {{below: number}}, not {limit!r}"
        )
    return Threshold(detector, sides[0][0], float(sides[0][1]))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _whole(name: str, value: object, minimum: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise Misdeclared(f"drift: {name} must be a whole number from {minimum}, not {value!r}")
    return value


def judge(reports: Iterable[Report], config: DriftConfig) -> list[Alert]:
    """The reports that cross their detector's threshold, in their order.

    A report of fewer than `minimum_records` records never alerts.
    """
    thresholds = {threshold.detector: threshold for threshold in config.alerts}
    return [
        Alert(report.day, report.detector, report.column, report.value, threshold.value)
        for report in reports
        if report.records >= config.minimum_records
        and (threshold := thresholds.get(report.detector)) is not None
        and threshold.crossed(report.value)
    ]


def retrain_due(history: Iterable[Alert], config: DriftConfig, *, day: str) -> bool:
    """Whether `day`, the one just judged, makes it time to train the version again.

    `history` holds the version's alerts, in any order, those of `day` among them. A run is an
    unbroken row of calendar days up to `day` with an alert of RETRAIN_DETECTORS. With n =
    `retrain_after_alert_days` retraining is due on the nth day of a run and again on every nth
    after it, so a run asks once in n days, not every day, and is not forgotten if training failed.
    """
    if config.retrain_after_alert_days is None:
        return False
    alerted = {date.fromisoformat(a.day) for a in history if a.detector in RETRAIN_DETECTORS}
    judged, run = date.fromisoformat(day), 0
    while judged - timedelta(days=run) in alerted:
        run += 1
    return run > 0 and run % config.retrain_after_alert_days == 0
