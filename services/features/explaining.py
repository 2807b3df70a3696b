"""From a vector back to the raw events behind it, recomputed from the log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from causemesh.log import LogReader
from services.features.domain.definitions import FeatureView, by_reference
from services.features.domain.events import ViewEvents, entity_keys, readable_events
from services.features.domain.feature_store import FeatureStore
from services.features.plan import event_frame

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
        events = {}
        for view in views.values():
            lowest = self._views[view.name] is view
            name = view.name if lowest else view.id
            events[name] = await self._view(store, view, request, asked.as_of_us)
        vector = store.answer_chunk(request, wanted, np.array([asked.as_of_us]))[0]
        values = {
            name: None if np.isnan(value) else float(value)
            for name, value in zip(wanted, vector, strict=True)
        }
        return Explained(values, events)

    async def _view(
        self, store: FeatureStore, view: FeatureView, request: pl.DataFrame, as_of_us: int
    ) -> dict[str, Any]:
        """Apply one view's events of the entity; returns what counts: how many and the newest."""
        if not set(view.request_entity) <= set(request.columns):
            return {"entity": None, "events": 0, "newest": []}
        key = entity_keys(request, view, view.request_entity)[0]
        oldest_us = _oldest_us(view, as_of_us)
        places: list[dict[str, Any]] = []
        async for batch in self._log.read(await self._log.ends([f"events.{view.event_type}"])):
            found, _ = readable_events(view, event_frame(batch))
            mine = (found.entity == key).to_numpy() & (found.occurred_at_us < as_of_us)
            if mine.any():
                store.views[view.id].apply(found.take(np.flatnonzero(mine)))
                counts = mine & (found.occurred_at_us >= oldest_us)
                places += _places(batch.topic, batch.partition, found, counts)
        newest = sorted(places, key=lambda place: (place["occurred_at_us"], place["position"]))
        return {"entity": key, "events": len(places), "newest": newest[-_SHOWN:]}


def _oldest_us(view: FeatureView, as_of_us: int) -> int:
    """The earliest event time that a feature of the view can see."""
    if any(feature.window_us is None for feature in view.features):
        return -(2**62) if view.retention_us is None else as_of_us - view.retention_us
    tile = view.tile_us
    return ((as_of_us - 1) // tile - view.tiles + 1) * tile


def _places(topic: str, partition: int, events: ViewEvents, counts: Any) -> list[dict[str, Any]]:
    return [
        {"topic": topic, "partition": partition, "position": position, "occurred_at_us": at_us}
        for position, at_us in zip(
            events.position[counts].tolist(), events.occurred_at_us[counts].tolist(), strict=True
        )
    ]
