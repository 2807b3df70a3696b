"""The events of a view out of the lake, day by day in order of time."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import polars as pl

from causemesh.catalogue import Catalogue
from causemesh.lake.reading import Lake
from services.features.domain.definitions import FeatureView
from services.features.plan import source_numbers


def view_events(
    lake: Lake,
    catalogue: Catalogue,
    view: FeatureView,
    since: datetime | None,
    until: datetime | None,
) -> Iterator[pl.DataFrame]:
    """Frames as `read_events` takes them, from one snapshot of the event's table.

    Raises Misdeclared when nothing was written to it yet.
    """
    topic = f"events.{view.event_type}"
    chosen = lake.select(topic, since=since, until=until)
    within = pl.col("occurred_at")
    first, last = chosen.lazy().select(within.min(), last=within.max()).collect().row(0)
    if first is None:
        return
    number = source_numbers(catalogue)
    numbers = {one: number(topic, one) for one in range(catalogue.topic(topic).partitions)}
    day = datetime(first.year, first.month, first.day, tzinfo=UTC)
    while day <= last:
        following = day + timedelta(days=1)
        frame = (
            lake.select(
                topic,
                since=max(day, chosen.since or day),
                until=min(following, chosen.until or following),
                snapshot_id=chosen.snapshot_id,
            )
            .lazy()
            .collect()
        )
        if frame.height:
            yield frame.with_columns(
                occurred_at_us=within.cast(pl.Datetime("us", "UTC")).to_physical(),
                source=pl.col("_partition").replace_strict(numbers, return_dtype=pl.Int64),
                position=pl.col("_position"),
            ).sort("occurred_at_us", "source", "position")
        day = following
