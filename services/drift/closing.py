"""Judges event-time days once the whole group's watermark has passed them and their labels."""

from __future__ import annotations

from collections.abc import Iterator

import structlog
from prometheus_client import Counter
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from causemesh.catalogue import NO_TENANT
from causemesh.clock import Clock
from causemesh.errors import Misdeclared
from causemesh.outbox import Event, add_events
from causemesh.periodic import repeat
from causemesh.positions_sql import SqlPositionStore
from causemesh.runner import Stage
from causemesh.sql import database_errors
from services.drift.domain.days import day_end_us, earlier, labels_until_us, last_due_day
from services.drift.domain.detectors import (
    RETRAIN_DETECTORS,
    Alert,
    DriftConfig,
    judge,
    retrain_due,
)
from services.drift.domain.reports import Report, daily_reports
from services.drift.domain.versions import Version
from services.drift.handlers import PREDICTIONS
from services.drift.store import Days, Observed, Verdict, VersionDay
from services.drift.versions import Versions

REPORTS = "drift.reports.v1"
ALERTS = "drift.alerts.v1"
RETRAINING = "training.requests.v1"

_log = structlog.get_logger(__name__)


class DayCloser:
    """Closes days in order; any number of processes may run one, and one works at a time.

    A day's result is a function of the log: all its predictions are in, and of their labels those
    count that occurred before the day was due, however late it is closed.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        store: SqlPositionStore,
        stage: Stage,
        *,
        partitions: int,
        versions: Versions,
        config: DriftConfig,
        clock: Clock,
        every_s: float,
        keep_days: int,
        outcomes: Counter,
    ) -> None:
        self._engine = engine
        self._days = Days(engine)
        self._store = store
        self._group = stage.group
        self._partitions = partitions
        self._versions = versions
        self._config = config
        self._clock = clock
        self._every_s = every_s
        self._keep_days = keep_days
        self._outcomes = outcomes
        self._pruned_until = ""

    async def run(self) -> None:
        """Close until cancelled."""
        await repeat("closing", self.close_due, self._clock, self._every_s)

    async def close_due(self) -> int:
        """Close every day that is due, then forget what can't count any more.

        Returns how many days were closed. Raises Retryable.
        """
        watermark_us = await self._store.watermark(self._group, self._partitions)
        if watermark_us is None or not self._versions.complete:
            return 0
        until = last_due_day(watermark_us, self._config.label_wait_hours)
        due = await self._days.due(until)
        for number, at in enumerate(due):
            if not await self._close(at):
                return number  # another process is closing
        # Only now: with every due day closed nothing older than the last of them is open.
        if until > self._pruned_until:
            before = earlier(until, self._keep_days)
            await self._days.forget(before, day_end_us(before))
            self._pruned_until = until
        return len(due)

    async def _close(self, at: VersionDay) -> bool:
        async with database_errors(), self._engine.begin() as transaction:
            if not await Days.lock(transaction):
                return False
            if not await Days.is_closed(transaction, at):
                await self._judge(transaction, at)
        return True

    async def _judge(self, transaction: AsyncConnection, at: VersionDay) -> None:
        known = self._versions.get(at.model, at.version)
        seen = await Days.observed(
            transaction,
            at,
            rule=known.rule.digest if known and known.rule else None,
            until_us=labels_until_us(at.day, self._config.label_wait_hours),
        )
        reports, problem = _measured(at, known, seen)
        alerts = judge(reports, self._config)
        history = [*await Days.earlier_alerts(transaction, at), *alerts]
        due = retrain_due(history, self._config, day=at.day)
        verdict = Verdict(reports, alerts, self._reason(at, alerts) if due else None, problem)
        await Days.close(transaction, at, seen.predictions, verdict)
        await add_events(transaction, list(_events(at, verdict, (PREDICTIONS, *seen.first))))
        self._outcomes.labels("day", "unmeasured" if problem else "closed").inc()
        for alert in alerts:
            self._outcomes.labels("drift_alert", alert.detector).inc()

    def _reason(self, at: VersionDay, alerts: list[Alert]) -> str:
        detectors = sorted({alert.detector for alert in alerts} & RETRAIN_DETECTORS)
        return (
            f"{' and '.join(detectors)} alerted on {at.day}; it is asked for on every"
            f" {self._config.retrain_after_alert_days} days in a row with such alerts"
        )


def _measured(
    at: VersionDay, known: Version | None, seen: Observed
) -> tuple[list[Report], str | None]:
    """The day's reports, and why there are none or not all."""
    if known is None:
        return [], "the version is not registered, so there is nothing to compare with"
    signature = known.signature
    counts = seen.counts if signature else seen.counts.clear()
    scored = seen.scored if known.rule else seen.scored.clear()
    try:
        reference = signature.reference if signature else {}
        return daily_reports(at.day, counts, scored, reference), known.problem
    except Misdeclared as error:
        return [], str(error)


def _events(at: VersionDay, verdict: Verdict, origin: tuple[str, int, int]) -> Iterator[Event]:
    """What is told about a judged day, in order."""
    common = {
        "tenant_id": NO_TENANT,
        "occurred_at": day_end_us(at.day),
        "model": at.model,
        "version": at.version,
    }
    for report in verdict.reports:
        yield Event(REPORTS, at.model, common | vars(report), origin)
    for alert in verdict.alerts:
        yield Event(ALERTS, at.model, common | vars(alert), origin)
    if verdict.retrain_reason is not None:
        yield Event(RETRAINING, at.model, common | {"reason": verdict.retrain_reason}, origin)
