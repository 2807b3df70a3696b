"""What was counted, scored, labelled and found.

Counts and spans have the partition in their key, so workers never wait for each other's rows; they
are added up when a day is judged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from causemesh.sql import database_errors, idle_for
from services.drift.domain.detectors import Alert
from services.drift.domain.reports import Report

metadata = sa.MetaData()


def _of_version() -> list[sa.Column[Any]]:
    return [
        sa.Column("model", sa.Text, primary_key=True),
        sa.Column("version", sa.Integer, primary_key=True),
        sa.Column("day", sa.Text, primary_key=True),
    ]


histograms = sa.Table(
    "histograms",
    metadata,
    *_of_version(),
    sa.Column("partition", sa.Integer, primary_key=True),
    sa.Column("column", sa.Text, primary_key=True),
    sa.Column("bin", sa.Integer, primary_key=True),
    sa.Column("count", sa.BigInteger, nullable=False),
)
day_spans = sa.Table(
    "day_spans",
    metadata,
    *_of_version(),
    sa.Column("partition", sa.Integer, primary_key=True),
    sa.Column("first_position", sa.BigInteger, nullable=False),
    sa.Column("last_position", sa.BigInteger, nullable=False),
    sa.Column("records", sa.BigInteger, nullable=False),
)
"""Which records of the predictions topic a day's measures came from."""

scored = sa.Table(
    "scored",
    metadata,
    sa.Column("tenant_id", sa.Text, primary_key=True),
    sa.Column("request_id", sa.Text, primary_key=True),
    sa.Column("model", sa.Text, nullable=False),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("day", sa.Text, nullable=False),
    sa.Column("score", sa.Double),
    sa.Index("scored_by_day", "day", "model", "version"),
)
labels = sa.Table(
    "labels",
    metadata,
    sa.Column("rule", sa.Text, primary_key=True),
    sa.Column("tenant_id", sa.Text, primary_key=True),
    sa.Column("request_id", sa.Text, primary_key=True),
    sa.Column("positive", sa.Boolean, nullable=False),
    sa.Column("occurred_us", sa.BigInteger, nullable=False),
    sa.Index("labels_by_age", "occurred_us"),
)
"""`rule` is LabelRule.digest."""

closed_days = sa.Table(
    "closed_days",
    metadata,
    *_of_version(),
    sa.Column("predictions", sa.BigInteger, nullable=False),
    sa.Column("retrain_reason", sa.Text),
    sa.Column("problem", sa.Text),
)
reports = sa.Table(
    "reports",
    metadata,
    *_of_version(),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("detector", sa.Text, nullable=False),
    sa.Column("column", sa.Text),
    sa.Column("value", sa.Double, nullable=False),
    sa.Column("records", sa.BigInteger, nullable=False),
)
alerts = sa.Table(
    "alerts",
    metadata,
    *_of_version(),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("detector", sa.Text, nullable=False),
    sa.Column("column", sa.Text),
    sa.Column("value", sa.Double, nullable=False),
    sa.Column("threshold", sa.Double, nullable=False),
)

_ADD_COUNTS = sa.text(
    """
    INSERT INTO histograms (model, version, day, partition, "column", bin, count)
    SELECT model, version, day, :partition, name, bin, count
    FROM unnest(CAST(:model AS text[]), CAST(:version AS int[]), CAST(:day AS text[]),
                CAST(:column AS text[]), CAST(:bin AS int[]), CAST(:count AS bigint[]))
         AS counted (model, version, day, name, bin, count)
    ON CONFLICT (model, version, day, partition, "column", bin)
    DO UPDATE SET count = histograms.count + excluded.count
    """
)
_ADD_SPANS = sa.text(
    """
    INSERT INTO day_spans (model, version, day, partition, first_position, last_position, records)
    SELECT model, version, day, :partition, first, last, records
    FROM unnest(CAST(:model AS text[]), CAST(:version AS int[]), CAST(:day AS text[]),
                CAST(:first AS bigint[]), CAST(:last AS bigint[]), CAST(:records AS bigint[]))
         AS span (model, version, day, first, last, records)
    ON CONFLICT (model, version, day, partition) DO UPDATE SET
        first_position = least(day_spans.first_position, excluded.first_position),
        last_position = greatest(day_spans.last_position, excluded.last_position),
        records = day_spans.records + excluded.records
    """
)
_ADD_SCORED = sa.text(
    """
    INSERT INTO scored (tenant_id, request_id, model, version, day, score)
    SELECT * FROM unnest(
        CAST(:tenant_id AS text[]), CAST(:request_id AS text[]), CAST(:model AS text[]),
        CAST(:version AS int[]), CAST(:day AS text[]), CAST(:score AS double precision[])
    )
    ON CONFLICT DO NOTHING
    """
)
# The least of a request's labels wins, in whatever order they are read. Rows go in by key, so that
# two workers that read labels of the same requests can't deadlock.
_ADD_LABELS = sa.text(
    """
    INSERT INTO labels (rule, tenant_id, request_id, occurred_us, positive)
    SELECT DISTINCT ON (rule, tenant_id, request_id) *
    FROM unnest(CAST(:rule AS text[]), CAST(:tenant_id AS text[]), CAST(:request_id AS text[]),
                CAST(:occurred_us AS bigint[]), CAST(:positive AS boolean[]))
         AS label (rule, tenant_id, request_id, occurred_us, positive)
    ORDER BY rule, tenant_id, request_id, occurred_us, positive
    ON CONFLICT (rule, tenant_id, request_id) DO UPDATE
    SET occurred_us = excluded.occurred_us, positive = excluded.positive
    WHERE (excluded.occurred_us, excluded.positive) < (labels.occurred_us, labels.positive)
    """
)
_DUE = sa.text(
    """
    SELECT DISTINCT model, version, day FROM day_spans
    WHERE day <= :until AND NOT EXISTS (
        SELECT FROM closed_days
        WHERE closed_days.model = day_spans.model AND closed_days.version = day_spans.version
              AND closed_days.day = day_spans.day
    )
    ORDER BY day, model, version
    """
)
# One row of arrays: far cheaper to read than a row a prediction.
_SCORED = sa.text(
    """
    SELECT array_agg(scored.score) AS score, array_agg(labels.positive) AS positive
    FROM scored LEFT JOIN labels
         ON labels.rule = :rule AND labels.tenant_id = scored.tenant_id
            AND labels.request_id = scored.request_id AND labels.occurred_us < :until_us
    WHERE scored.model = :model AND scored.version = :version AND scored.day = :day
    """
)
_RETRAIN_ALERTS = sa.text(
    """
    SELECT day, detector, "column", value, threshold FROM alerts
    WHERE model = :model AND version = :version AND day < :day
    """
)
_LOCK = sa.text("SELECT pg_try_advisory_xact_lock(:key)")
_CLOSER = 0x6472696674  # any number that every instance agrees on
_LONGEST_S = 600.0  # a day is measured between two statements


class Observations:
    """Writes of the workers, each inside the unit's transaction."""

    @staticmethod
    async def add_predictions(
        transaction: AsyncConnection, partition: int, *, rows: pl.DataFrame, counts: pl.DataFrame
    ) -> None:
        """Add predicted rows (columns of `scored` and position) and their counts (COUNTS)."""
        if not rows.height:
            return
        spans = rows.group_by("model", "version", "day").agg(
            pl.col("position").min().alias("first"),
            pl.col("position").max().alias("last"),
            pl.len().alias("records"),
        )
        at = {"partition": partition}
        await transaction.execute(_ADD_SPANS, _arrays(spans) | at)
        await transaction.execute(_ADD_SCORED, _arrays(rows.drop("position")))
        if counts.height:
            await transaction.execute(_ADD_COUNTS, _arrays(counts) | at)

    @staticmethod
    async def add_labels(transaction: AsyncConnection, found: pl.DataFrame) -> None:
        """Add labels (columns of `labels`); the first of a request in event time stays."""
        if found.height:
            await transaction.execute(_ADD_LABELS, _arrays(found))


@dataclass(frozen=True, order=True)
class VersionDay:
    """One event-time day of one model version."""

    day: str
    model: str
    version: int

    def key(self) -> dict[str, Any]:
        """As SQL parameters."""
        return {"model": self.model, "version": self.version, "day": self.day}


@dataclass(frozen=True)
class Observed:
    """All that was seen of one day.

    `counts` (column, bin, count) and `scored` (score, positive) are as `daily_reports` takes them;
    `first` is the first prediction (partition, position) in the lowest partition.
    """

    counts: pl.DataFrame
    scored: pl.DataFrame
    predictions: int
    first: tuple[int, int]


@dataclass(frozen=True)
class Verdict:
    """What a day's judgement found."""

    reports: Sequence[Report]
    alerts: Sequence[Alert]
    retrain_reason: str | None
    problem: str | None


class Days:
    """Days to be judged, and what was found."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    async def due(self, until: str) -> list[VersionDay]:
        """Open days up to `until`, in the order in which they must be closed. Raises Retryable."""
        async with database_errors(), self._engine.connect() as connection:
            rows = await connection.execute(_DUE, {"until": until})
            return [VersionDay(row.day, row.model, row.version) for row in rows]

    @staticmethod
    async def lock(transaction: AsyncConnection) -> bool:
        """Whether this transaction is the one that closes days now, until it ends."""
        await idle_for(transaction, _LONGEST_S)
        return bool((await transaction.execute(_LOCK, {"key": _CLOSER})).scalar_one())

    @staticmethod
    async def is_closed(transaction: AsyncConnection, at: VersionDay) -> bool:
        """Whether the day was closed before."""
        statement = sa.select(sa.literal(1)).select_from(closed_days).filter_by(**at.key())
        return (await transaction.execute(statement)).scalar() is not None

    @staticmethod
    async def observed(
        transaction: AsyncConnection, at: VersionDay, *, rule: str | None, until_us: int
    ) -> Observed:
        """What was seen of a day, with labels by `rule` (a digest) from before `until_us`."""
        columns = histograms.c
        counted = await transaction.execute(
            sa.select(
                columns.column, columns.bin, sa.cast(sa.func.sum(columns.count), sa.BigInteger)
            )
            .filter_by(**at.key())
            .group_by(columns.column, columns.bin)
        )
        shape = {"column": pl.String, "bin": pl.Int32, "count": pl.Int64}
        counts = pl.DataFrame([tuple(row) for row in counted], schema=shape, orient="row")
        pairs = {"score": pl.Float64, "positive": pl.Boolean}
        arrays = (
            await transaction.execute(_SCORED, {**at.key(), "rule": rule, "until_us": until_us})
        ).one()
        scores = pl.DataFrame(
            {"score": arrays.score or [], "positive": arrays.positive or []}, schema=pairs
        )
        spans = await transaction.execute(
            sa.select(day_spans).filter_by(**at.key()).order_by(day_spans.c.partition)
        )
        found = spans.all()
        first = (found[0].partition, found[0].first_position)
        return Observed(counts, scores, sum(row.records for row in found), first)

    @staticmethod
    async def earlier_alerts(transaction: AsyncConnection, at: VersionDay) -> list[Alert]:
        """The version's alerts of the days before."""
        rows = await transaction.execute(_RETRAIN_ALERTS, at.key())
        return [Alert(*row) for row in rows]

    @staticmethod
    async def close(
        transaction: AsyncConnection, at: VersionDay, predictions: int, verdict: Verdict
    ) -> None:
        """Store what was found; a closed day never changes."""
        key = at.key()
        await transaction.execute(
            sa.insert(closed_days).values(
                **key,
                predictions=predictions,
                retrain_reason=verdict.retrain_reason,
                problem=verdict.problem,
            )
        )
        found: list[tuple[sa.Table, Sequence[Report] | Sequence[Alert]]] = [
            (reports, verdict.reports),
            (alerts, verdict.alerts),
        ]
        for table, entries in found:
            rows = [
                {**key, **vars(entry), "number": number} for number, entry in enumerate(entries)
            ]
            if rows:
                await transaction.execute(sa.insert(table), rows)

    async def forget(self, before_day: str, labels_before_us: int) -> int:
        """Drop what can't count any more; returns how many rows. Raises Retryable."""
        statements = [
            sa.delete(scored).where(scored.c.day < before_day),
            sa.delete(histograms).where(histograms.c.day < before_day),
            sa.delete(labels).where(labels.c.occurred_us < labels_before_us),
        ]
        async with database_errors(), self._engine.begin() as connection:
            return sum([int((await connection.execute(one)).rowcount) for one in statements])


def _arrays(frame: pl.DataFrame) -> dict[str, list[Any]]:
    return frame.to_dict(as_series=False)
