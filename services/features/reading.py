"""Batches as the views see them."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from causemesh.runner import Batch
from services.features.domain.definitions import FeatureView
from services.features.domain.events import Ints, ViewEvents, readable_events
from services.features.plan import Plan, event_frame
from services.features.rekeying import INPUTS, unpacked

Read = tuple[FeatureView, ViewEvents]
"""What a view sees of a batch."""
Placed = tuple[FeatureView, ViewEvents, Ints]
"""The same with the positions of the records in the batch."""


def read_views(
    views: Sequence[FeatureView], frame: pl.DataFrame
) -> tuple[list[Read], dict[int, str]]:
    """What each view sees, and the rows that one or more can't take, with all their reasons."""
    found = []
    refused: dict[int, list[str]] = {}
    for view in views:
        events, bad = readable_events(view, frame)
        found.append((view, events))
        for row, reason in bad.items():
            refused.setdefault(row, []).append(reason)
    return found, {row: "; ".join(reasons) for row, reasons in refused.items()}


class JoinReader:
    """Reads what the views of one request partition see: events, and inputs that were re-keyed."""

    def __init__(self, plan: Plan, partition: int) -> None:
        self._views = plan.views
        self._by_id = {view.id: view for view in plan.views}
        self._partition = partition

    def read(self, batch: Batch) -> tuple[list[Placed], dict[int, str]]:
        """What each view sees of a batch, and the rows that can't be taken, with their reasons."""
        if batch.topic == INPUTS:
            return self._inputs(batch), {}
        frame = event_frame(batch)
        views = [
            view
            for view in self._views
            if f"events.{view.event_type}" == batch.topic
            and (
                view.placement == "broadcast"
                or (view.placement == "partitioned" and batch.partition == self._partition)
            )
        ]
        found, bad = read_views(views, frame)
        return [(view, events, events.position) for view, events in found], bad

    def _inputs(self, batch: Batch) -> list[Placed]:
        """View inputs by view and by the partition of events they came from, which breaks ties."""
        found = []
        frame = batch.frame.with_columns(
            batch.frame["cause"].struct.field("partition").alias("number"),
            pl.Series("at", batch.positions),
        )
        for (name, number), part in frame.group_by("view", "number", maintain_order=True):
            view = self._by_id.get(str(name))
            if view is not None:  # inputs of a view that is no longer declared
                events = unpacked(view, part, int(str(number)))
                found.append((view, events, part["at"].to_numpy()))
        return found
