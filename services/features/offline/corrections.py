"""Corrected and retracted events: from which as-of time on each no longer counts.

As of `s` an event counts if it occurred before `s` and no correction of it did. So one that is
corrected counts for the as-of times between its own and that of its earliest correction, but for
corrections that occurred before it by more than an answer looks back.
"""

from __future__ import annotations

import numpy as np
import polars as pl

from services.features.domain.corrections import reach_us
from services.features.domain.definitions import CORRECTION_COLUMNS, FeatureView
from services.features.offline.history import Mask, Places
from services.features.offline.spans import Asked, expanded

_ID, _TARGET, _VOID = (f"value.{name}" for name in CORRECTION_COLUMNS)


def takes_corrections(view: FeatureView) -> bool:
    """Whether events of the view may be corrected."""
    return bool(view.corrects or view.retracts)


def with_ends(view: FeatureView, events: pl.DataFrame) -> pl.DataFrame:
    """The events that ever count, with `until`: the last as-of time that they count for, or null.

    Events are as in `history.py`; all corrections must be among them, of whatever entity.
    """
    events = events.with_row_index("row")
    fixes = events.filter(pl.col(_TARGET).is_not_null()).select(_TARGET, fixed="at")
    early = pl.col("at") - pl.col("fixed") > reach_us(view)
    ends = (
        events.select("row", "at", _ID)
        .join(fixes, left_on=_ID, right_on=_TARGET)
        .filter(~early)
        .group_by("row")
        .agg(pl.col("fixed").min().alias("until"))
    )
    ever = pl.col("until").is_null() | (pl.col("until") > pl.col("at"))
    return (
        events.filter(pl.col(_VOID).is_null())
        .join(ends, on="row", how="left")
        .filter(ever)
        .drop("row")
    )


def meanwhile(events: pl.DataFrame, asked: Asked) -> Mask:
    """Which requests see an event that was corrected later."""
    brief = events.filter(pl.col("until").is_not_null())
    starts, ends = _places(brief, "at"), _places(brief, "until")
    began = starts.before(asked.entity, asked.as_of_us)
    return np.asarray(began > ends.before(asked.entity, asked.as_of_us))


def _places(events: pl.DataFrame, time: str) -> Places:
    ordered = events.sort("entity", time)
    return Places(ordered["entity"].to_numpy(), ordered[time].to_numpy())


def of_each(view: FeatureView, events: pl.DataFrame, asked: Asked) -> pl.DataFrame:
    """The events that count for each request, as if each were an entity of its own."""
    ordered = events.sort("entity", "at")
    places = Places(ordered["entity"].to_numpy(), ordered["at"].to_numpy())
    low = places.before(asked.entity, asked.as_of_us - reach_us(view))
    high = places.before(asked.entity, asked.as_of_us)
    owners, at = expanded(low, high)
    mine = ordered[at].with_columns(
        pl.Series("entity", owners), pl.Series("as_of", asked.as_of_us[owners])
    )
    counts = pl.col("until").is_null() | (pl.col("until") >= pl.col("as_of"))
    return mine.filter(counts).drop("as_of")
