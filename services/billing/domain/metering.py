"""Hourly usage buckets, each with the positions it came from.

A bucket is what one tenant used of one meter in one hour of event time, from one partition. Its
range `[first, last]` covers it exactly: the tenant's events of that hour that the meter's filter
lets through, and whose position is in the range, are the ones counted (all of them, no others), so
the quantity can be computed again from the log.

`quantity_micro` is int64 millionths of the meter's unit: each event's value is `rint(value * 1e6)`,
and from there on everything is integer arithmetic, exact in any grouping. A bucket of a `unique`
meter has no quantity of its own (null): distinct counts do not add up, its members do (`members`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import polars as pl
from polars.exceptions import InvalidOperationError

from causemesh.errors import Misdeclared
from services.billing.domain.plans import AGGREGATIONS, Aggregation, Meter
from services.billing.domain.rows import MICRO, matching_rows

USAGE_SCHEMA = pl.Schema(
    {
        "tenant_id": pl.String(),
        "meter": pl.String(),
        "aggregation": pl.String(),
        "topic": pl.String(),
        "partition": pl.Int32(),
        "hour_us": pl.Int64(),
        "quantity_micro": pl.Int64(),
        "first": pl.Int64(),
        "last": pl.Int64(),
        "at_us": pl.Int64(),
        "at_position": pl.Int64(),
    }
)
"""A bucket's columns. `hour_us` is the start of the hour and `at_us` the event time of the newest
event, both microseconds since the epoch; `at_position` is that event's position."""

BUCKET = ("tenant_id", "meter", "aggregation", "topic", "partition", "hour_us")
"""The columns that name a bucket."""

_QUANTITY = pl.col("quantity_micro")
# Rows come sorted by event time and position. Int128, because polars' int64 sum wraps in silence.
_REDUCE: dict[Aggregation, pl.Expr] = {
    "count": _QUANTITY.cast(pl.Int128).sum(),
    "sum": _QUANTITY.cast(pl.Int128).sum(),
    "max": _QUANTITY.max(),
    "latest": _QUANTITY.last(),
    "unique": _QUANTITY.first(),
}


def meter_batch(
    meter: Meter, frame: pl.DataFrame, topic: str, partition: int, positions: npt.NDArray[np.int64]
) -> pl.DataFrame:
    """The usage in one batch of one partition: USAGE_SCHEMA, one row a tenant and hour.

    `positions[i]` is the position of row i of `frame`. Raises Misdeclared when filter or value do
    not fit the topic, Poison naming the rows whose value is null, NaN, infinite, negative or too
    large.
    """
    rows = matching_rows(meter, frame, pl.Series(positions, dtype=pl.Int64))
    quantity = pl.lit(None, pl.Int64) if meter.aggregation == "unique" else pl.col("value")
    events = rows.select(
        "tenant_id",
        "hour_us",
        quantity.alias("quantity_micro"),
        pl.col("position").alias("first"),
        pl.col("position").alias("last"),
        "at_us",
        pl.col("position").alias("at_position"),
    )
    usage = reduce_usage(events, ("tenant_id", "hour_us"), meter.aggregation)
    return (
        usage.with_columns(
            meter=pl.lit(meter.name),
            aggregation=pl.lit(meter.aggregation),
            topic=pl.lit(topic),
            partition=pl.lit(partition, pl.Int32),
        )
        .select(USAGE_SCHEMA.names())
        .sort(BUCKET)
    )


def merge_usage(a: pl.DataFrame, b: pl.DataFrame) -> pl.DataFrame:
    """Two sets of buckets as one: associative, commutative, sorted by bucket.

    The two must come from different events; the runner's positions see to that.
    """
    both = pl.concat([a, b])
    merged = [
        reduce_usage(both.filter(pl.col("aggregation") == aggregation), BUCKET, aggregation)
        for aggregation in AGGREGATIONS
    ]
    return pl.concat(merged).select(USAGE_SCHEMA.names()).sort(BUCKET)


def reduce_usage(
    usage: pl.DataFrame, keys: Sequence[str], aggregation: Aggregation
) -> pl.DataFrame:
    """One row for each of `keys`, for usage of one aggregation.

    `latest` takes the value of the highest (at_us, at_position), then partition where there is one.
    Raises Misdeclared when a sum leaves int64.
    """
    order = ["at_us", "at_position", *(["partition"] if "partition" in usage.columns else [])]
    try:
        return (
            usage.sort(order)
            .group_by(keys)
            .agg(
                _REDUCE[aggregation],
                pl.col("first").min(),
                pl.col("last").max(),
                pl.col("at_us").last(),
                pl.col("at_position").last(),
            )
            .with_columns(_QUANTITY.cast(pl.Int64))
        )
    except InvalidOperationError as error:
        raise Misdeclared(
            f"a sum of usage is beyond {2**63 // MICRO} units; divide the meter's value, "
            "such as bytes / 1e9"
        ) from error
