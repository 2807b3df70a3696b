"""The events of a view out of the lake, day by day in order of time."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import polars as pl

from causemesh.catalogue import Catalogue
from causemesh.lake.reading import Lake
from services.features.domain.definitions import FeatureView
from services.features.domain.events import event_columns
from services.features.plan import LAKE_PLACE, lake_frame


def view_events(
    lake: Lake,
    catalogue: Catalogue,
    view: FeatureView,
    since: datetime | None,
    until: datetime | None,
) -> Iterator[pl.DataFrame]:
    """Frames as `readable_events` takes them, from one snapshot of the event's table.

    Raises Misdeclared when nothing was written to it yet.
    """
    topic = f"events.{view.event_type}"
    chosen = lake.select(topic, since=since, until=until)
    within = pl.col("occurred_at")
    first, last = chosen.lazy().select(within.min(), last=within.max()).collect().row(0)
    if first is None:
        return
    declared, columns = catalogue.topic(topic), event_columns(view)
    there = {field.name for field in chosen.table.schema().fields}
    known = [*there.intersection(columns), *LAKE_PLACE]
    day = datetime(first.year, first.month, first.day, tzinfo=UTC)
    while day <= last:
        following = day + timedelta(days=1)
        rows = (
            lake.select(
                topic,
                since=max(day, chosen.since or day),
                until=min(following, chosen.until or following),
                snapshot_id=chosen.snapshot_id,
                columns=known,
            )
            .lazy()
            .collect()
        )
        if rows.height:
            events = lake_frame(declared, rows, columns)
            yield events.sort("occurred_at_us", "source", "position")
        day = following
