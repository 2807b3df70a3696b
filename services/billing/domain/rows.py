"""The events that a meter sees, and what each one weighs."""

from __future__ import annotations

import polars as pl
from polars.exceptions import PolarsError

from causemesh.errors import Misdeclared, Poison
from services.billing.domain.plans import Meter

MICRO = 10**6
"""`quantity_micro` of one unit."""

HOUR_US = 3600 * 10**6

# Above 2**53 a float64 no longer holds every integer, so the rounding to millionths would be a lie.
_LIMIT_MICRO = 2**53
_YEAR_10000_US = 253_402_300_800 * 10**6
_TEXTUAL = (pl.String, pl.Categorical, pl.Enum, pl.Boolean)


def matching_rows(meter: Meter, frame: pl.DataFrame, positions: pl.Series) -> pl.DataFrame:
    """One row an event that passes the meter's filter.

    `frame` is the topic's columns, `positions` each row's position. The answer has tenant_id, at_us
    (event time, microseconds), hour_us (start of its hour), position, and value: int64 millionths,
    or for `unique` the text to be told apart. Raises Misdeclared when the expressions do not fit
    the topic, Poison naming the rows of `frame` that cannot be counted.
    """
    seen = frame.with_columns(__row=pl.int_range(pl.len(), dtype=pl.Int64), __position=positions)
    rows = _weighed(meter, _evaluated(meter, seen))
    _refuse_faulty(meter, rows)
    value = pl.col("value")
    if meter.aggregation != "unique":
        value = value.round(0, mode="half_to_even").cast(pl.Int64)
    return rows.select(
        "tenant_id",
        "at_us",
        (pl.col("at_us") - pl.col("at_us") % HOUR_US).alias("hour_us"),
        "position",
        value,
    )


def _evaluated(meter: Meter, seen: pl.DataFrame) -> pl.DataFrame:
    try:
        return _select(meter, seen)
    except PolarsError as error:
        try:
            _select(meter, seen.clear())
        except PolarsError as mismatch:
            raise Misdeclared(
                f"billing.yaml: meters.{meter.name}: filter or value does not fit topic "
                f"{meter.topic}: {mismatch}"
            ) from mismatch
        # The expression suits the topic but not some row (a cast, say). Which one it is, the runner
        # finds out by trying them alone; that costs nobody but that row's sender.
        raise error from None


def _select(meter: Meter, seen: pl.DataFrame) -> pl.DataFrame:
    kept = seen if meter.filter is None else seen.filter(pl.sql_expr(meter.filter))
    return kept.select(
        row="__row",
        tenant_id="tenant_id",
        at_us=pl.col("occurred_at").dt.epoch("us"),
        position="__position",
        value=pl.lit(1) if meter.value is None else pl.sql_expr(meter.value),
    )


def _weighed(meter: Meter, rows: pl.DataFrame) -> pl.DataFrame:
    """`value` as float64 millionths, or as text for `unique`."""
    dtype = rows.schema["value"]
    if meter.aggregation == "unique":
        if dtype.is_integer() or dtype in _TEXTUAL:
            return rows.with_columns(pl.col("value").cast(pl.String))
        _refuse_type(meter, dtype, "text or whole numbers; cast it to varchar")
    if dtype.is_numeric() or dtype == pl.Boolean:
        return rows.with_columns(pl.col("value").cast(pl.Float64) * MICRO)
    return _refuse_type(meter, dtype, "numbers")


def _refuse_type(meter: Meter, dtype: pl.DataType, expected: str) -> pl.DataFrame:
    raise Misdeclared(
        f"billing.yaml: meters.{meter.name}.value: {meter.aggregation} needs {expected}; "
        f"{meter.value!r} over {meter.topic} is {dtype}"
    )


def _refuse_faulty(meter: Meter, rows: pl.DataFrame) -> None:
    value = pl.col("value")
    in_time = pl.col("at_us").is_between(0, _YEAR_10000_US, closed="left")
    faults = {
        "is null": value.is_null(),
        "has no occurred_at in the years 1970 to 9999": ~in_time,
    }
    if meter.aggregation != "unique":
        faults |= {
            "is NaN or infinite": ~value.is_finite(),
            "is negative; usage only grows, a correction is a credit": value < 0,
            f"is beyond {_LIMIT_MICRO // MICRO} units; meter a larger one": value > _LIMIT_MICRO,
        }
    first = pl.coalesce(pl.when(wrong).then(pl.lit(why)) for why, wrong in faults.items())
    reasons = rows.select("row", fault=first).drop_nulls("fault")
    if reasons.height:
        said = f"meter {meter.name}: {meter.value or 'the event'} "
        raise Poison({row: said + why for row, why in reasons.iter_rows()})
