"""What a feature is, said as plainly as possible: one pass over a list of events per answer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from services.features.domain.definitions import Feature, FeatureView
from services.features.domain.windows import Window


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
    number = _over(view, feature, feature.window, events, as_of_us)
    if feature.per is None:
        return number
    divisor = _over(view, feature, feature.per, events, as_of_us)
    return math.nan if math.isnan(divisor) or divisor == 0 else number / divisor


def _over(
    view: FeatureView, feature: Feature, window: Window | None, events: list[Event], as_of_us: int
) -> float:
    events = sorted(events, key=lambda e: e.order)
    if window is not None:
        events = _in_window(view, window, events, as_of_us)
    elif view.retention_us is not None:
        events = [e for e in events if e.occurred_at_us >= as_of_us - view.retention_us]
    if feature.column is None:
        if feature.aggregation == "count":
            return len(events)
        return (as_of_us - events[-1].occurred_at_us) / 1e6 if events else math.nan
    column = [c.name for c in view.columns].index(feature.column)
    if feature.aggregation == "ewma":
        return _ewma(view, feature, column, events, as_of_us)
    units = [_units(view, e.inputs[column]) for e in events]
    return _aggregate(feature.aggregation, [u for u in units if u is not None], view.resolution)


def _in_window(
    view: FeatureView, window: Window, events: list[Event], as_of_us: int
) -> list[Event]:
    """The events in a window; given and returned in order."""
    if window.shape == "tumbling":
        end = as_of_us // window.length_us * window.length_us
        return [e for e in events if end - window.length_us <= e.occurred_at_us < end]
    newest = (as_of_us - 1) // view.tile_us
    oldest = newest - window.length_us // view.tile_us + 1
    near = [e for e in events if oldest <= e.occurred_at_us // view.tile_us <= newest]
    if window.shape != "session":
        return near
    session: list[Event] = []
    following_us = as_of_us
    for event in reversed(near):
        if following_us - event.occurred_at_us > window.part_us:
            break
        session.insert(0, event)
        following_us = event.occurred_at_us
    return session


def _ewma(
    view: FeatureView, feature: Feature, column: int, events: list[Event], as_of_us: int
) -> float:
    """sum(w * q) / sum(w) with w = 2**(-age / half-life), whole tiles and whole weights."""
    weighted = weight = 0
    for event in events:
        unit = _units(view, event.inputs[column])
        age = (as_of_us - 1) // view.tile_us - event.occurred_at_us // view.tile_us
        if unit is not None:
            w = round(2**16 * 2.0 ** (-(age * view.tile_us) / feature.part_us))
            weighted, weight = weighted + w * unit, weight + w
    if weight == 0:
        return math.nan
    high, low = weighted >> 32, weighted & (2**32 - 1)
    return (high * 2.0**32 + low) / weight * view.resolution


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
    pick = {"min": min(units), "max": max(units), "first": units[0]}
    pick |= {"last": units[-1], "latest": units[-1]}
    return pick[kind] * resolution
