"""Which primitives a view keeps, and how its features are made from them.

Most aggregations rest on three primitives that can be merged in any order: integer sums, minima
(a maximum is the minimum of the negated value) and the newest record (the oldest is the newest one
by negated time). A square is summed in two halves, so that it is exact for inputs up to 2**31 grid
units.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from services.features.domain.definitions import Aggregation, Feature, FeatureView
from services.features.domain.events import NULL, Ints
from services.features.domain.sketches import SketchKind
from services.features.domain.windows import Window, decay_weights

# place, span, span of the divisor, parameter, parts
_Member = tuple[int, int, int, float, tuple[int, ...]]
Selector = slice | Ints
SumKind = Literal["count", "sum", "square_high", "square_low"]
EVENT = -1  # in place of a column: the event itself ...
TIME = -2  # ... or the time of it

_SUMS: dict[str, tuple[SumKind, ...]] = {
    "count": ("count",),
    "sum": ("sum",),
    "mean": ("count", "sum"),
    "std": ("count", "sum", "square_high", "square_low"),
    "ewma": ("count", "sum"),
}
_SKETCHES: dict[str, SketchKind] = {
    "distinct": "registers",
    "quantile": "buckets",
    "top": "values",
    "share": "values",
}
_SIGNS = {"min": 1, "max": -1, "last": 1, "first": -1}
SQUARE_BITS = 31


@dataclass(frozen=True)
class Group:
    """The features of one aggregation: where they stand and what they are made from.

    places: columns of the answer; spans: which window; parts: for each primitive, its index;
    per: which window the divisor is over, None where nothing is divided; parameters: of each.
    """

    aggregation: Aggregation
    places: Ints
    spans: Ints
    parts: tuple[Ints, ...]
    per: Ints | None = None
    parameters: tuple[float, ...] = ()

    @cached_property
    def target(self) -> Selector:
        """Selects the group's rows of an answer by feature."""
        return selector(self.places)

    @cached_property
    def own(self) -> Selector:
        """Selects its first primitives where those have no windows."""
        return selector(self.parts[0])

    @cached_property
    def sources(self) -> tuple[tuple[Any, Selector], ...]:
        """Selects each of its primitives from an array by part and window."""
        spans = selector(self.spans)
        return tuple(
            (int(part[0]), spans)
            if isinstance(spans, slice) and (part == part[0]).all()
            else (part, self.spans)
            for part in self.parts
        )

    @cached_property
    def divisor(self) -> Group | None:
        """The same over the windows of the divisors; None where nothing is divided."""
        return None if self.per is None else replace(self, spans=self.per, per=None)


@dataclass(frozen=True)
class Decay:
    """A weighted sum of tiles. weights: by age; count and total: which sums they weigh."""

    weights: Ints
    count: int
    total: int


@dataclass(frozen=True)
class Layout:
    """The primitives of a view. Columns are numbered in the view's order; EVENT is the event.

    windows: sliding ones first, shortest first; spans: their lengths in tiles; sums: (kind,
    column); mins and lasts: (sign, column); latests: columns; decays; sketches: (kind, column);
    groups: the features.
    """

    windows: tuple[Window, ...]
    spans: Ints
    sums: tuple[tuple[SumKind, int], ...]
    mins: tuple[tuple[int, int], ...]
    lasts: tuple[tuple[int, int], ...]
    latests: tuple[int, ...]
    decays: tuple[Decay, ...]
    sketches: tuple[tuple[SketchKind, int], ...]
    groups: tuple[Group, ...]

    @property
    def ordered(self) -> bool:
        """Whether the tie-break between events of equal time can show in an answer."""
        return bool(self.lasts or self.latests)

    @property
    def sliding(self) -> int:
        """How many of the windows are sliding."""
        return sum(window.shape == "sliding" for window in self.windows)


@dataclass
class _Draft:
    """The primitives found so far, each with its index."""

    sums: dict[tuple[SumKind, int], int] = field(default_factory=dict)
    mins: dict[tuple[int, int], int] = field(default_factory=dict)
    lasts: dict[tuple[int, int], int] = field(default_factory=dict)
    latests: dict[int, int] = field(default_factory=dict)
    decays: dict[tuple[Window, int], int] = field(default_factory=dict)
    sketches: dict[tuple[SketchKind, int], int] = field(default_factory=dict)

    def parts(self, feature: Feature, column: int) -> tuple[int, ...]:
        """The indexes of what a feature is made from."""
        kind = feature.aggregation
        if kind in _SUMS:
            sums = tuple(self.sums.setdefault((s, column), len(self.sums)) for s in _SUMS[kind])
            if kind != "ewma" or feature.window is None:
                return sums
            return (self.decays.setdefault((feature.window, column), len(self.decays)),)
        if kind in _SKETCHES:
            sketch = (_SKETCHES[kind], column)
            return (self.sketches.setdefault(sketch, len(self.sketches)),)
        if kind in _SIGNS:
            kept = self.mins if kind in ("min", "max") else self.lasts
            return (kept.setdefault((_SIGNS[kind], column), len(kept)),)
        return (self.latests.setdefault(column, len(self.latests)),)


def layout_of(view: FeatureView) -> Layout:
    """The layout that the view's features need."""
    column_of: dict[str | None, int] = {c.name: i for i, c in enumerate(view.columns)}
    column_of[None] = EVENT
    windows = tuple(w for w in view.windows if w.shape != "decayed")
    span_of: dict[Window | None, int] = {window: i for i, window in enumerate(windows)}
    draft = _Draft()
    grouped: dict[tuple[Aggregation, bool], list[_Member]] = {}
    for place, feature in enumerate(view.features):
        parts = draft.parts(feature, column_of[feature.column])
        span, per = span_of.get(feature.window, 0), span_of.get(feature.per, 0)
        key = (feature.aggregation, feature.per is not None)
        grouped.setdefault(key, []).append((place, span, per, feature.parameter, parts))
    if any(window.shape == "session" for window in windows):
        for sign in (1, -1):
            draft.mins.setdefault((sign, TIME), len(draft.mins))
    return Layout(
        windows=windows,
        spans=np.array([w.length_us // view.tile_us for w in windows], np.int64),
        sums=tuple(draft.sums),
        mins=tuple(draft.mins),
        lasts=tuple(draft.lasts),
        latests=tuple(draft.latests),
        sketches=tuple(draft.sketches),
        decays=_decays(view, draft.decays, draft.sums),
        groups=tuple(_group(*key, members) for key, members in grouped.items()),
    )


def _decays(
    view: FeatureView,
    decays: Mapping[tuple[Window, int], int],
    sums: Mapping[tuple[SumKind, int], int],
) -> tuple[Decay, ...]:
    return tuple(
        Decay(
            np.array(decay_weights(window, view.tile_us), np.int64),
            sums["count", column],
            sums["sum", column],
        )
        for window, column in decays
    )


def _group(
    kind: Aggregation,
    divided: bool,
    members: Sequence[_Member],
) -> Group:
    places, spans, per, parameters, parts = zip(*members, strict=True)
    index = [np.array(column, np.int64) for column in zip(*parts, strict=True)]
    divisors = np.array(per, np.int64) if divided else None
    return Group(
        kind,
        np.array(places, np.int64),
        np.array(spans, np.int64),
        tuple(index),
        divisors,
        parameters,
    )


def summands(layout: Layout, values: Ints) -> Ints:
    """What each event adds to each sum: int64 [sums, n] from values [columns, n]."""
    out = np.empty((len(layout.sums), values.shape[1]), np.int64)
    for row, (kind, column) in zip(out, layout.sums, strict=True):
        if column == EVENT:
            row[:] = 1
            continue
        present = values[column] != NULL
        if kind == "count":
            row[:] = present
            continue
        units = np.where(present, values[column], 0)
        row[:] = units if kind == "sum" else _half_square(kind, units)
    return out


def _half_square(kind: SumKind, units: Ints) -> Ints:
    square = units * units
    return square >> SQUARE_BITS if kind == "square_high" else square & ((1 << SQUARE_BITS) - 1)


def minima(layout: Layout, values: Ints, times: Ints, empty: int) -> Ints:
    """What each event offers to each minimum: int64 [mins, n], `empty` where it has no value."""
    out = np.empty((len(layout.mins), values.shape[1]), np.int64)
    for row, (sign, column) in zip(out, layout.mins, strict=True):
        if column == TIME:
            np.multiply(times, sign, out=row)
            continue
        np.multiply(values[column], sign, out=row)
        row[values[column] == NULL] = empty
    return out


def present(columns: Sequence[int], values: Ints) -> npt.NDArray[np.bool_]:
    """Which events have a value: bool [len(columns), n]; for EVENT all have."""
    out = np.ones((len(columns), values.shape[1]), np.bool_)
    for row, column in zip(out, columns, strict=True):
        if column != EVENT:
            np.not_equal(values[column], NULL, out=row)
    return out


def selector(numbers: Ints) -> Selector:
    """The numbers as an index: a slice, which copies nothing, where they are consecutive."""
    first = int(numbers[0])
    consecutive = np.array_equal(numbers, np.arange(first, first + len(numbers)))
    return slice(first, first + len(numbers)) if consecutive else numbers
