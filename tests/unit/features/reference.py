"""What a feature is, said as plainly as possible: one pass over a list of events per answer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from services.features.domain.definitions import Feature, FeatureView


@dataclass(frozen=True)
class Event:
    entity: str | None
    occurred_at_us: int
    source: int
    position: int
    inputs: tuple[float | None, ...]

    @property
    def order(self) -> tuple[int, int, int]:
        return (self.occurred_at_us, self.source, self.position)


def frame_of(view: FeatureView, events: Sequence[Event]) -> pl.DataFrame:
    """Events as the engine gets them; the view has one entity column and plain input columns."""
    return pl.DataFrame(
        {
            "tenant_id": ["t"] * len(events),
            view.entity[0]: [e.entity for e in events],
            "occurred_at_us": [e.occurred_at_us for e in events],
            "source": [e.source for e in events],
            "position": [e.position for e in events],
            **{c.name: [e.inputs[i] for e in events] for i, c in enumerate(view.columns)},
        },
        schema={
            "tenant_id": pl.String,
            view.entity[0]: pl.String,
            "occurred_at_us": pl.Int64,
            "source": pl.Int32,
            "position": pl.Int64,
            **{c.name: pl.Float64 for c in view.columns},
        },
    )


def expected(
    view: FeatureView, events: Sequence[Event], entity: str | None, as_of_us: int
) -> list[np.float32]:
    """The vector of one entity as of one time, from all events of the view."""
    seen = [
        e
        for e in events
        if entity is not None and e.entity == entity and e.occurred_at_us < as_of_us
    ]
    return [np.float32(_feature(view, f, seen, as_of_us)) for f in view.features]


def _feature(view: FeatureView, feature: Feature, events: list[Event], as_of_us: int) -> float:
    if feature.window_us is not None:
        newest = (as_of_us - 1) // view.tile_us
        oldest = newest - feature.window_us // view.tile_us + 1
        events = [e for e in events if oldest <= e.occurred_at_us // view.tile_us <= newest]
    if feature.aggregation in ("latest", "age") and view.retention_us is not None:
        events = [e for e in events if e.occurred_at_us >= as_of_us - view.retention_us]
    events = sorted(events, key=lambda e: e.order)
    if feature.column is None:
        if feature.aggregation == "count":
            return len(events)
        return (as_of_us - events[-1].occurred_at_us) / 1e6 if events else math.nan
    column = [c.name for c in view.columns].index(feature.column)
    units = [_units(view, e.inputs[column]) for e in events]
    return _aggregate(feature.aggregation, [u for u in units if u is not None], view.resolution)


def _units(view: FeatureView, number: float | None) -> int | None:
    if number is None or math.isnan(number):
        return None
    return round(number / view.resolution)


def _aggregate(kind: str, units: list[int], resolution: float) -> float:
    if kind == "count":
        return len(units)
    if kind == "sum":
        return sum(units) * resolution
    if not units:
        return math.nan
    n = len(units)
    if kind == "mean":
        return sum(units) / n * resolution
    if kind == "std":
        center = round(sum(units) / n)
        offset = sum(u - center for u in units) / n
        deviations = sum((u - center) ** 2 for u in units)
        return math.sqrt(max(deviations / n - offset * offset, 0.0)) * resolution
    pick = {"min": min(units), "max": max(units), "last": units[-1], "latest": units[-1]}
    return pick[kind] * resolution
