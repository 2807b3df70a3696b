"""Columns as arrays without the query engine.

A live record comes alone, and polars' engine costs 30 to 90 microseconds a call however few the
rows are: `is_null`, `to_physical`, `fill_null`, `gather` and `filter` of a frame go through it.
What is here does not, where the common case needs none of it, and is as quick on many rows.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import polars as pl

Int64s = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


def int64s(series: pl.Series) -> Int64s:
    """Whole numbers, or instants in their unit, without nulls: int64 [n]."""
    return series.cast(pl.Int64).to_numpy()


def filled_int64s(series: pl.Series, value: int) -> Int64s:
    """`int64s` with `value` where the column is null."""
    nulls = series.null_count()
    if nulls == len(series):
        return np.full(nulls, value, dtype=np.int64)
    return int64s(series.cast(pl.Int64).fill_null(value) if nulls else series)


def null_mask(series: pl.Series) -> Mask:
    """Where the column is null: bool [n]."""
    nulls = series.null_count()
    if nulls in (0, len(series)):
        return np.full(len(series), nulls > 0, dtype=bool)
    return series.is_null().to_numpy()


def kept(frame: pl.DataFrame, keep: Mask) -> pl.DataFrame:
    """The rows of `frame` where `keep` holds; the frame itself where it always does."""
    return frame if keep.all() else frame.filter(pl.Series(keep))
