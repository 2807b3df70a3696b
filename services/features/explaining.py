"""From a vector back to the raw events behind it, recomputed from the log.

What came late for a view counts as the stream had it: not at all, or for requests after those that
were answered without it. That is on a topic of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import numpy as np
import polars as pl

from causemesh.log import LogReader
from services.features.domain.definitions import FeatureView, by_reference
from services.features.domain.events import ViewEvents, entity_keys, readable_events
from services.features.domain.feature_store import FeatureStore
from services.features.lateness import LATE
from services.features.plan import event_frame
from services.features.seen import late_events, seen

_SHOWN = 5


@dataclass(frozen=True)
class Asked:
    """Whose features, as of when (microseconds)."""

    tenant_id: str
    entities: Mapping[str, str | None]
    features: Sequence[str]
    as_of_us: int


@dataclass(frozen=True)
class Explained:
    """Features recomputed from the log, and by view the events that count."""

    values: dict[str, float | None]
    events: dict[str, dict[str, Any]]


class Explainer:
    """Reads the event topics of the views that a request asks for."""

    def __init__(self, log: LogReader, views: Sequence[FeatureView]) -> None:
        self._log = log
        self._views = by_reference(views)

    async def explain(self, asked: Asked) -> Explained:
        """Recompute the features from the events before `as_of_us`, and say which they are."""
        wanted = [name for name in asked.features if name.split(".")[0] in self._views]
        # `door` and `door@v1` may be the same view: its events count once
        views = {self._views[one].id: self._views[one] for one in (n.split(".")[0] for n in wanted)}
        request = pl.DataFrame(
            {"tenant_id": [asked.tenant_id], **{k: [v] for k, v in asked.entities.items()}},
            schema_overrides=dict.fromkeys(asked.entities, pl.String),
        )
        store = FeatureStore(views.values())
        events, late = {}, await self._late()
        for view in views.values():
            lowest = self._views[view.name] is view
            name = view.name if lowest else view.id
            events[name] = await self._view(store, view, request, asked.as_of_us, late)
        vector = store.answer_chunk(request, wanted, np.array([asked.as_of_us]))[0]
        values = {
            name: None if np.isnan(value) else float(value)
            for name, value in zip(wanted, vector, strict=True)
        }
        return Explained(values, events)

    async def _view(
        self,
        store: FeatureStore,
        view: FeatureView,
        request: pl.DataFrame,
        as_of_us: int,
        late: pl.DataFrame | None,
    ) -> dict[str, Any]:
        """Apply one view's events of the entity; returns what counts: how many and the newest."""
        if not set(view.request_entity) <= set(request.columns):
            return {"entity": None, "events": 0, "newest": []}
        key = entity_keys(request, view, view.request_entity)[0]
        applied = await self._events(view, key, as_of_us)
        if late is not None:
            had = seen(view, applied, late_events(view, late.filter(pl.col("entity") == key)))
            applied = had.events.take(np.flatnonzero(had.since_us < as_of_us))
        if len(applied):
            store.views[view.id].apply(applied)
        oldest_us = _oldest_us(view, as_of_us)
        counting = applied.take(np.flatnonzero(applied.occurred_at_us >= oldest_us))
        newest = sorted(_places(view, counting), key=itemgetter("occurred_at_us", "position"))
        return {"entity": key, "events": len(counting), "newest": newest[-_SHOWN:]}

    async def _events(self, view: FeatureView, key: str | None, before_us: int) -> ViewEvents:
        """The entity's events before this time; not those that the view can't take."""
        parts = [ViewEvents.none(view)]
        async for batch in self._log.read(await self._log.ends([f"events.{view.event_type}"])):
            found, _ = readable_events(view, event_frame(batch))
            mine = (found.entity == key).to_numpy() & (found.occurred_at_us < before_us)
            if mine.any():
                parts.append(found.take(np.flatnonzero(mine)))
        return ViewEvents.concatenate(parts)

    async def _late(self) -> pl.DataFrame | None:
        """The records of what came late for any view; None when there are none."""
        frames = [one.frame async for one in self._log.read(await self._log.ends([LATE]))]
        return pl.concat(frames) if frames else None


def _oldest_us(view: FeatureView, as_of_us: int) -> int:
    """The earliest event time that a feature of the view can see."""
    if any(feature.window_us is None for feature in view.features):
        return -(2**62) if view.retention_us is None else as_of_us - view.retention_us
    tile = view.tile_us
    return ((as_of_us - 1) // tile - view.tiles + 1) * tile


def _places(view: FeatureView, events: ViewEvents) -> list[dict[str, Any]]:
    topic = f"events.{view.event_type}"
    columns = (events.source, events.position, events.occurred_at_us)
    return [
        {"topic": topic, "partition": partition, "position": position, "occurred_at_us": at_us}
        for partition, position, at_us in zip(*(one.tolist() for one in columns), strict=True)
    ]
