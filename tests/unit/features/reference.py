"""What a feature is, said as plainly as possible: one pass over a list of events per answer."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from services.features.domain.definitions import Feature, FeatureView
from services.features.domain.sketches import MAX_VALUES
from services.features.domain.windows import Window


@dataclass(frozen=True)
class Event:
    entity: str | None
    occurred_at_us: int
    source: int
    position: int
    inputs: tuple[float | None, ...]
    target: str | None = None
    void: bool = False

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
    before = [e for e in events if e.entity is not None and e.occurred_at_us < as_of_us]
    reach = max(view.tiles * view.tile_us, view.retention_us or 0)
    fixes = [e for e in before if e.target is not None]
    removed = {
        e.position
        for fix in fixes
        for e in before
        if fix.target == f"e{e.position}" and fix.occurred_at_us >= e.occurred_at_us - reach
    }
    seen = [e for e in before if e.entity == entity and not e.void and e.position not in removed]
    seen.sort(key=lambda e: e.order)
    windows = {w for f in view.features for w in (f.window, f.per)}
    shown = {window: _shown(view, window, seen, as_of_us) for window in windows}
    return [np.float32(_feature(view, f, shown, as_of_us)) for f in view.features]


def _shown(
    view: FeatureView, window: Window | None, events: list[Event], as_of_us: int
) -> list[Event]:
    """The events that count for a window, or without one; given and returned in order."""
    if window is not None:
        return _in_window(view, window, events, as_of_us)
    if view.retention_us is not None:
        return [e for e in events if e.occurred_at_us >= as_of_us - view.retention_us]
    return events


def _feature(
    view: FeatureView, feature: Feature, shown: Mapping[Window | None, list[Event]], as_of_us: int
) -> float:
    number = _over(view, feature, shown[feature.window], as_of_us)
    if feature.per is None:
        return number
    divisor = _over(view, feature, shown[feature.per], as_of_us)
    return math.nan if math.isnan(divisor) or divisor == 0 else number / divisor


def _over(view: FeatureView, feature: Feature, events: list[Event], as_of_us: int) -> float:
    if feature.column is None:
        if feature.aggregation == "count":
            return len(events)
        return (as_of_us - events[-1].occurred_at_us) / 1e6 if events else math.nan
    column = [c.name for c in view.columns].index(feature.column)
    if feature.aggregation == "ewma":
        return _ewma(view, feature, column, events, as_of_us)
    units = [_units(view, e.inputs[column]) for e in events]
    present = [u for u in units if u is not None]
    if feature.aggregation in ("distinct", "quantile", "top", "share"):
        tiles = [e.occurred_at_us // view.tile_us for e in events]
        tiled = [(t, u) for t, u in zip(tiles, units, strict=True) if u is not None]
        return _sketched(feature, present, tiled, view.resolution)
    return _aggregate(feature.aggregation, present, view.resolution)


def _in_window(
    view: FeatureView, window: Window, events: list[Event], as_of_us: int
) -> list[Event]:
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


def _sketched(
    feature: Feature, units: list[int], tiled: list[tuple[int, int]], resolution: float
) -> float:
    if feature.aggregation == "distinct":
        return distinct(set(units))
    if not units:
        return math.nan
    if feature.aggregation == "quantile":
        exact = sorted(units)[math.floor(feature.parameter * (len(units) - 1))]
        return middle(exact) * resolution
    for tile in {t for t, _ in tiled}:
        if len({u for t, u in tiled if t == tile}) > MAX_VALUES:
            return math.nan
    k = int(feature.parameter)
    ranked = sorted(Counter(units).items(), key=lambda item: (-item[1], item[0]))
    if feature.aggregation == "top":
        return ranked[k - 1][0] * resolution if k <= len(ranked) else math.nan
    return sum(count for _, count in ranked[:k]) / len(units)


def middle(unit: int) -> float:
    """The middle of the run of numbers that share sign and first seven binary digits."""
    size = abs(unit)
    dropped = max(size.bit_length() - 7, 0)
    low = size >> dropped << dropped
    return math.copysign(low + (2**dropped - 1) / 2, unit)


def distinct(units: set[int]) -> float:
    """HyperLogLog with 1,024 registers and Ertl's estimator, one register after another."""
    m, bits = 1024, 54
    registers: dict[int, int] = {}
    for unit in units:
        mixed = mix(unit)
        rest = mixed & (2**bits - 1)
        place = mixed >> bits
        registers[place] = max(registers.get(place, 0), bits - rest.bit_length() + 1)
    having = Counter(registers.values())  # how many registers there are of each rank
    having[0] = m - len(registers)
    x = 1 - having[bits + 1] / m
    tau, y, before = 1 - x, 1.0, math.inf
    while 0 < x < 1 and tau != before:
        x, y, before = math.sqrt(x), y / 2, tau
        tau -= (1 - x) ** 2 * y
    z = m * (tau / 3 if 0 < x < 1 else 0.0)
    for rank in range(bits, 0, -1):
        z = 0.5 * (z + having[rank])
    x = having[0] / m
    if x == 1:
        return 0.0
    sigma, y, before = x, 1.0, math.inf
    while sigma != before:
        x, before = x * x, sigma
        sigma, y = sigma + x * y, y + y
    return m * m / (z + m * sigma) / (2 * math.log(2))


def mix(unit: int) -> int:
    """The finaliser of splitmix64."""
    bits = (unit + 0x9E3779B97F4A7C15) % 2**64
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB % 2**64
    return bits ^ (bits >> 31)


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
