"""A month's usage of a tenant, rolled up from hourly buckets."""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl

from causemesh.errors import Misdeclared
from services.billing.domain.metering import reduce_usage
from services.billing.domain.plans import AGGREGATIONS
from services.billing.domain.rows import MICRO


@dataclass(frozen=True)
class PositionRange:
    """Where in the log usage is: positions `first` to `last`, both included."""

    topic: str
    partition: int
    first: int
    last: int


@dataclass(frozen=True)
class UsageRow:
    """All that a tenant used of a meter in one month, as far as is known.

    `usage_period` is the month (`2013-01`), `quantity_micro` millionths of the meter's unit.
    """

    meter: str
    usage_period: str
    quantity_micro: int
    ranges: tuple[PositionRange, ...]


_MONTHLY = ("tenant_id", "meter", "usage_period")
_PERIOD = pl.from_epoch("hour_us", time_unit="us").dt.strftime("%Y-%m").alias("usage_period")


def monthly_usage(usage: pl.DataFrame, members: pl.DataFrame) -> dict[str, list[UsageRow]]:
    """Each tenant's usage by meter and month, in that order.

    `usage` is in USAGE_SCHEMA, of any hours and partitions; `members` (MEMBER_SCHEMA) are those of
    the `unique` meters in it. A month's `max` and `latest` are over the whole month, a `unique`
    counts each member once. Raises Misdeclared when a meter's aggregation changed on the way.
    """
    monthly = usage.with_columns(_PERIOD)
    _refuse_changed(monthly)
    quantities = [
        reduce_usage(monthly.filter(pl.col("aggregation") == a), _MONTHLY, a)
        for a in AGGREGATIONS
        if a != "unique"
    ]
    distinct = members.with_columns(_PERIOD).group_by(_MONTHLY)
    counted = distinct.agg(quantity_micro=pl.col("hash64").n_unique().cast(pl.Int64) * MICRO)
    totals = pl.concat(
        [frame.select(*_MONTHLY, "quantity_micro") for frame in [*quantities, counted]]
    )
    ranges = _ranges(monthly)
    rows: dict[str, list[UsageRow]] = {}
    for tenant, meter, period, quantity in totals.sort(_MONTHLY).iter_rows():
        row = UsageRow(meter, period, quantity, ranges[tenant, meter, period])
        rows.setdefault(tenant, []).append(row)
    return rows


def _ranges(monthly: pl.DataFrame) -> dict[tuple[str, str, str], tuple[PositionRange, ...]]:
    keys = [*_MONTHLY, "topic", "partition"]
    spans = monthly.group_by(keys).agg(pl.col("first").min(), pl.col("last").max()).sort(keys)
    ranges: dict[tuple[str, str, str], tuple[PositionRange, ...]] = {}
    for tenant, meter, period, *span in spans.iter_rows():
        key = (tenant, meter, period)
        ranges[key] = (*ranges.get(key, ()), PositionRange(*span))
    return ranges


def _refuse_changed(monthly: pl.DataFrame) -> None:
    kinds = monthly.group_by(_MONTHLY).agg(pl.col("aggregation").unique().sort())
    for tenant, meter, period, found in kinds.iter_rows():
        if len(found) > 1:
            raise Misdeclared(
                f"meter {meter!r} was {' and '.join(found)} in {period} (tenant {tenant}); "
                "give a meter with another aggregation another name"
            )
