"""Corrected and retracted events: from which as-of time on each no longer counts.

As of `s` an event counts if it occurred before `s` and no correction of it did. So one that is
corrected counts for the as-of times between its own and that of its earliest correction, but for
corrections that occurred before it by more than an answer looks back. Where one of the two came
late, what counts is not its own time but that since which the view had it.
"""

from __future__ import annotations

import polars as pl

from services.features.domain.corrections import reach_us
from services.features.domain.definitions import CORRECTION_COLUMNS, FeatureView

_ID, _TARGET, _VOID = (f"value.{name}" for name in CORRECTION_COLUMNS)


def takes_corrections(view: FeatureView) -> bool:
    """Whether events of the view may be corrected."""
    return bool(view.corrects or view.retracts)


def with_ends(view: FeatureView, events: pl.DataFrame) -> pl.DataFrame:
    """The events that ever count, with `until`: the last as-of time that they count for, or null.

    Events are as in `history.py`, with `since`; all corrections must be among them, of whatever
    entity.
    """
    events = events.with_row_index("row")
    fixes = events.filter(pl.col(_TARGET).is_not_null())
    fixes = fixes.select(_TARGET, fixed="at", known="since")
    early = pl.col("at") - pl.col("fixed") > reach_us(view)
    ends = (
        events.select("row", "at", _ID)
        .join(fixes, left_on=_ID, right_on=_TARGET)
        .filter(~early)
        .group_by("row")
        .agg(pl.col("known").min().alias("until"))
    )
    ever = pl.col("until").is_null() | (pl.col("until") > pl.col("since"))
    return (
        events.filter(pl.col(_VOID).is_null())
        .join(ends, on="row", how="left")
        .filter(ever)
        .drop("row")
    )
