"""Dead letters: what could not be handled, with its bytes, its reason and its cause."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl

from causemesh.catalogue import DEADLETTERS, NO_TENANT
from causemesh.runner.batch import Batch, Outgoing

DeadRows = list[tuple[Batch, dict[int, str]]]
"""Batches with the rows of their raw batch that are dead, and why."""


def raw_rows(batch: Batch, reasons: Mapping[int, str]) -> dict[int, str]:
    """Reasons by frame row to reasons by raw row."""
    return {int(batch.rows[row]): reason for row, reason in reasons.items()}


def dead_letters(service: str, dead: DeadRows) -> list[Outgoing]:
    """One Outgoing for each input partition, its rows in position order."""
    merged: dict[tuple[str, int], tuple[Batch, dict[int, str]]] = {}
    for batch, reasons in dead:
        _, known = merged.setdefault((batch.topic, batch.partition), (batch, {}))
        known.update(reasons)
    return [_letters(service, batch, reasons) for batch, reasons in merged.values()]


def _letters(service: str, batch: Batch, reasons: dict[int, str]) -> Outgoing:
    raw = batch.raw
    rows = sorted(reasons)
    count = len(rows)
    frame = pl.DataFrame(
        {
            "tenant_id": pl.Series([NO_TENANT] * count, dtype=pl.String),
            "occurred_at": pl.Series(raw.appended_at_us[rows], dtype=pl.Int64).cast(
                pl.Datetime("us", "UTC")
            ),
            "service": pl.Series([service] * count, dtype=pl.String),
            "reason": pl.Series([reasons[row] for row in rows], dtype=pl.String),
            "original_key": pl.Series([raw.keys[row] for row in rows], dtype=pl.Binary),
            "original_value": pl.Series(_values(raw.values, rows), dtype=pl.Binary),
        }
    )
    positions = np.asarray(raw.positions[rows], dtype=np.int64)
    keys: list[bytes | None] = [None] * count
    return Outgoing(DEADLETTERS, frame, keys, batch.topic, batch.partition, positions)


def _values(values: Sequence[bytes | None], rows: Sequence[int]) -> list[bytes | None]:
    return [values[row] for row in rows]
