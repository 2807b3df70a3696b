"""What waits in lists of parts: split by time, packed for a checkpoint, joined."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl

from services.features.domain.aggregates import RowEvents
from services.features.domain.columns import pack_columns, unpack_columns


def split(parts: list[RowEvents], at_us: int) -> tuple[list[RowEvents], list[RowEvents]]:
    """The events before this time, and the others; parts that are on one side are not copied."""
    before, left = [], []
    for part in parts:
        due = part.occurred_at_us < at_us
        if due.all():
            before.append(part)
        elif due.any():
            before.append(part.take(due))
            left.append(part.take(~due))
        else:
            left.append(part)
    return before, left


def packed(parts: Sequence[RowEvents]) -> bytes:
    """Events that wait, as bytes."""
    own = ("rows", "occurred_at_us", "source", "position")
    columns = {name: [getattr(part, name) for part in parts] for name in own}
    for place in range(len(parts[0].values)):
        columns[f"values.{place}"] = [part.values[place] for part in parts]
    return pack_columns({"kind": "pending"}, columns)


def unpacked(saved: bytes) -> RowEvents:
    """The same, read back."""
    _, columns, _ = unpack_columns(saved, "pending")
    rows, times, source, position, *values = columns.values()
    matrix = np.array(values, np.int64).reshape(len(values), len(rows))
    return RowEvents(rows, times, source, position, matrix)


def append(parts: list[RowEvents], more: RowEvents) -> None:
    """Add a part, joining small ones: few parts, and each event is copied few times."""
    parts.append(more)
    while len(parts) > 1 and len(parts[-2]) <= 2 * len(parts[-1]):
        parts[-2:] = [RowEvents.concatenate(parts[-2:])]


def joined(frame: pl.DataFrame | None, more: pl.DataFrame) -> pl.DataFrame:
    """The rows of both."""
    # diagonal: the payload may have gained a column since what is buffered was written
    return more if frame is None else pl.concat([frame, more], how="diagonal_relaxed")
