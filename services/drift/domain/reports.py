"""A day's measures of one model version."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import polars as pl

from causemesh.errors import Misdeclared
from services.drift.domain.histograms import SCORE, Histogram, Ints
from services.drift.domain.measures import accuracy, auc, label_coverage, psi

Detector = Literal["psi", "score_psi", "auc", "accuracy", "label_coverage"]
DETECTORS: tuple[Detector, ...] = get_args(Detector)


@dataclass(frozen=True)
class Report:
    """One measure over one day; `column` only for `psi`, `records` is what it was measured on."""

    day: str
    detector: Detector
    column: str | None
    value: float
    records: int


def daily_reports(
    day: str, counts: pl.DataFrame, scored: pl.DataFrame, reference: Mapping[str, Histogram]
) -> list[Report]:
    """Measure one day of one model version.

    `counts` holds the day's rows of `count_batch`, added up or not (column, bin, count); `scored`
    one row for each predicted request of the day (score float, positive bool, null where there is
    no label yet). `psi` comes first, by column name; the order is always the same. A measure that
    is undefined is left out. Raises Misdeclared for counts that do not fit the reference.
    """
    current = _dense(counts, reference)
    reports = [
        *_drift(day, current, reference),
        *_decay(day, scored),
    ]
    return [report for report in reports if not math.isnan(report.value)]


def _dense(counts: pl.DataFrame, reference: Mapping[str, Histogram]) -> dict[str, Ints]:
    """Sparse (column, bin, count) rows as one array of n + 2 counts for each column."""
    dense = {name: np.zeros_like(histogram.counts) for name, histogram in reference.items()}
    for (name,), rows in counts.group_by(["column"], maintain_order=True):
        bins = rows["bin"].to_numpy()
        if name not in dense or bins.max() >= len(dense[name]) or bins.min() < 0:
            raise Misdeclared(
                f"counts of column {name!r} do not fit the reference: they were made with another "
                "version's edges, so count that day again with this version's"
            )
        np.add.at(dense[name], bins, rows["count"].to_numpy())
    return dense


def _drift(
    day: str, current: Mapping[str, Ints], reference: Mapping[str, Histogram]
) -> Iterator[Report]:
    columns = [*sorted(set(current) - {SCORE}), *({SCORE} & set(current))]
    for name in columns:
        value = psi(reference[name].counts, current[name])
        records = int(current[name].sum())
        if name == SCORE:
            yield Report(day, "score_psi", None, value, records)
        else:
            yield Report(day, "psi", name, value, records)


def _decay(day: str, scored: pl.DataFrame) -> Iterator[Report]:
    labelled = scored.drop_nulls("positive")
    # a prediction without a number has no rank and no side of the threshold
    rated = labelled.filter(pl.col("score").is_not_nan().fill_null(False))
    scores, labels = rated["score"].to_numpy(), rated["positive"].to_numpy()
    yield Report(day, "auc", None, auc(scores, labels), len(rated))
    yield Report(day, "accuracy", None, accuracy(scores, labels), len(rated))
    coverage = label_coverage(len(labelled), len(scored))
    yield Report(day, "label_coverage", None, coverage, len(scored))
