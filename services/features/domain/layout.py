"""Which primitives a view keeps, and how its features are made from them.

Nine aggregations rest on three primitives that can be merged in any order: integer sums, minima
(a maximum is the minimum of the negated value) and the newest record. A square is summed in two
halves, so that it is exact for inputs up to 2**31 grid units.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from services.features.domain.definitions import Aggregation, FeatureView
from services.features.domain.events import NULL, Ints

SumKind = Literal["count", "sum", "square_high", "square_low"]
EVENT = -1  # in place of a column: the event itself

_SUMS: dict[str, tuple[SumKind, ...]] = {
    "count": ("count",),
    "sum": ("sum",),
    "mean": ("count", "sum"),
    "std": ("count", "sum", "square_high", "square_low"),
}
SQUARE_BITS = 31


@dataclass(frozen=True)
class Group:
    """The features of one aggregation: where they stand and what they are made from.

    places: columns of the answer; spans: which window; parts: for each primitive, its index.
    """

    aggregation: Aggregation
    places: Ints
    spans: Ints
    parts: tuple[Ints, ...]


@dataclass(frozen=True)
class Layout:
    """The primitives of a view. Columns are numbered in the view's order; EVENT is the event.

    spans: the window lengths in tiles, ascending; sums: (kind, column); mins: (sign, column);
    lasts and latests: columns; groups: the features.
    """

    spans: Ints
    sums: tuple[tuple[SumKind, int], ...]
    mins: tuple[tuple[int, int], ...]
    lasts: tuple[int, ...]
    latests: tuple[int, ...]
    groups: tuple[Group, ...]

    @property
    def ordered(self) -> bool:
        """Whether the tie-break between events of equal time can show in an answer."""
        return bool(self.lasts or self.latests)


def layout_of(view: FeatureView) -> Layout:
    """The layout that the view's features need."""
    column_of: dict[str | None, int] = {c.name: i for i, c in enumerate(view.columns)}
    column_of[None] = EVENT
    sums: dict[tuple[SumKind, int], int] = {}
    mins: dict[tuple[int, int], int] = {}
    lasts: dict[int, int] = {}
    latests: dict[int, int] = {}
    grouped: dict[Aggregation, list[tuple[int, int, tuple[int, ...]]]] = {}
    for place, feature in enumerate(view.features):
        kind, column = feature.aggregation, column_of[feature.column]
        parts: tuple[int, ...]
        if kind in _SUMS:
            parts = tuple(sums.setdefault((s, column), len(sums)) for s in _SUMS[kind])
        elif kind in ("min", "max"):
            parts = (mins.setdefault((1 if kind == "min" else -1, column), len(mins)),)
        else:
            kept = lasts if kind == "last" else latests
            parts = (kept.setdefault(column, len(kept)),)
        span = 0 if feature.window_us is None else view.windows.index(feature.window_us)
        grouped.setdefault(kind, []).append((place, span, parts))
    spans = np.array([w // view.tile_us for w in view.windows], np.int64)
    groups = tuple(_group(kind, members) for kind, members in grouped.items())
    return Layout(spans, tuple(sums), tuple(mins), tuple(lasts), tuple(latests), groups)


def _group(kind: Aggregation, members: Sequence[tuple[int, int, tuple[int, ...]]]) -> Group:
    places, spans, parts = zip(*members, strict=True)
    index = [np.array(column, np.int64) for column in zip(*parts, strict=True)]
    return Group(kind, np.array(places, np.int64), np.array(spans, np.int64), tuple(index))


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


def minima(layout: Layout, values: Ints, empty: int) -> Ints:
    """What each event offers to each minimum: int64 [mins, n], `empty` where it has no value."""
    out = np.empty((len(layout.mins), values.shape[1]), np.int64)
    for row, (sign, column) in zip(out, layout.mins, strict=True):
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
