"""From predictions and events to counts, scores and labels: columns in, rows out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import polars as pl
from prometheus_client import Counter

from causemesh.bus.base import Positions
from causemesh.catalogue import Catalogue
from causemesh.clock import Clock
from causemesh.errors import Misdeclared, Poison, Retryable
from causemesh.runner import Batch, Emission, Stage
from services.drift.domain.histograms import COUNTS, count_batch
from services.drift.domain.labels import label_batch
from services.drift.store import Observations
from services.drift.versions import Versions

GROUP = "drift"
PREDICTIONS = "inference.predictions.v1"


def stage_of(catalogue: Catalogue) -> Stage:
    """What drift reads: predictions, and every event type, since any of them may hold labels.

    Raises Misdeclared when their partition counts differ.
    """
    events = [kind.events for kind in catalogue.event_types.values()]
    partitions = catalogue.topic(PREDICTIONS).partitions
    for name in events:
        if catalogue.topic(name).partitions != partitions:
            raise Misdeclared(
                f"{name} has {catalogue.topic(name).partitions} partitions and {PREDICTIONS} has"
                f" {partitions}; drift reads both by partition number: give them the same"
            )
    return Stage("drift", GROUP, (PREDICTIONS, *events))


class Monitor:
    """The processor of one partition number; its effects are rows in the unit's transaction.

    A prediction of a version that is not known waits for it, and with it the partition: for
    `version_wait_s` of wall clock, counted anew after a restart. Then its score is kept but its
    columns are not counted, so a version that is never registered can't stop the others.
    """

    takes_bad_rows = False
    stateful = False

    def __init__(
        self, versions: Versions, *, clock: Clock, version_wait_s: float, outcomes: Counter
    ) -> None:
        self._versions = versions
        self._clock = clock
        self._version_wait_s = version_wait_s
        self._outcomes = outcomes
        self._waiting_since: dict[tuple[str, int], float] = {}

    async def process(
        self, batches: Sequence[Batch], watermark_us: int, transaction: Any
    ) -> Emission:
        """See `Processor.process`. Raises Retryable while a version is not known."""
        if not self._versions.complete:
            raise Retryable("the registered model versions are not read yet")
        labels = []
        for number, batch in enumerate(batches):
            if batch.topic == PREDICTIONS:
                await self._predictions(number, batch, transaction)
            else:
                labels += self._labels(batch)
        if labels:
            await Observations.add_labels(transaction, pl.concat(labels))
        return Emission()

    async def _predictions(self, number: int, batch: Batch, transaction: Any) -> None:
        pairs = _pairs(batch.frame)
        self._wait_for(pairs)
        try:
            counts = [self._counted(batch.frame, *pair) for pair in pairs]
        except Poison as poison:
            raise Poison(poison.rows, batch=number) from poison
        rows = _predicted(batch.frame, batch.positions)
        await Observations.add_predictions(
            transaction,
            batch.partition,
            rows=rows,
            counts=pl.concat(counts) if counts else COUNTS.to_frame(),
        )
        self._outcomes.labels("prediction", "scored").inc(rows.height)

    def _wait_for(self, pairs: Sequence[tuple[str, int]]) -> None:
        now = self._clock.monotonic()
        for model, version in pairs:
            if self._versions.get(model, version) is None:
                since = self._waiting_since.setdefault((model, version), now)
                if now - since < self._version_wait_s:
                    raise Retryable(f"model {model!r} version {version} is not known yet")

    def _counted(self, frame: pl.DataFrame, model: str, version: int) -> pl.DataFrame:
        known = self._versions.get(model, version)
        if known is None or known.signature is None:
            self._outcomes.labels("version", "not_counted").inc()
            return COUNTS.to_frame()
        return count_batch(frame, known.signature)

    def _labels(self, batch: Batch) -> list[pl.DataFrame]:
        rules = self._versions.rules(batch.topic.removeprefix("events."))
        found = [
            label_batch(rule, batch.frame).select(
                pl.lit(rule.digest).alias("rule"),
                "tenant_id",
                "request_id",
                pl.col("occurred_at").to_physical().alias("occurred_us"),
                "positive",
            )
            for rule in sorted(rules, key=lambda rule: rule.digest)
        ]
        self._outcomes.labels("label", "read").inc(sum(map(len, found)))
        return found

    def snapshot(self) -> bytes | None:
        """No state beside the database."""
        return None

    def restore(self, state: bytes | None) -> None:
        """No state beside the database."""


def _pairs(frame: pl.DataFrame) -> list[tuple[str, int]]:
    """The versions that predicted, in order."""
    predicted = frame.filter(pl.col("outcome") == "predicted")
    return sorted(predicted.select("model", "version").unique().rows())


def _predicted(frame: pl.DataFrame, positions: Positions) -> pl.DataFrame:
    return (
        frame.with_columns(pl.Series("position", positions))
        .filter(pl.col("outcome") == "predicted")
        .select(
            "tenant_id",
            "request_id",
            "model",
            "version",
            pl.col("occurred_at").dt.to_string("%Y-%m-%d").alias("day"),
            "score",
            "position",
        )
    )
