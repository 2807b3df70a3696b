"""Columns as arrays: the same as the query engine's answers."""

from __future__ import annotations

import polars as pl
import pytest

from causemesh.series import filled_int64s, int64s, kept, null_mask

CASES = [[], [1], [None], [1, None, 3], [None, None]]


@pytest.mark.parametrize("dtype", [pl.Int32, pl.Datetime("us", "UTC")])
@pytest.mark.parametrize("values", CASES)
def test_arrays_are_those_of_the_engine(values: list[int | None], dtype: pl.DataType) -> None:
    series = pl.Series(values, dtype=pl.Int64).cast(dtype)
    physical = series.to_physical().cast(pl.Int64)
    assert null_mask(series).tolist() == series.is_null().to_list()
    assert filled_int64s(series, -7).tolist() == physical.fill_null(-7).to_list()
    if not series.null_count():
        assert int64s(series).tolist() == physical.to_list()


def test_kept_rows() -> None:
    frame = pl.DataFrame({"a": [1, 2, 3]})
    assert kept(frame, frame["a"].to_numpy() > 1)["a"].to_list() == [2, 3]
    assert kept(frame, frame["a"].to_numpy() > 0) is frame
