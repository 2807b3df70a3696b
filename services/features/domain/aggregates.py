"""Partial aggregates that merge in any order to the same bits: sums, minima, newest records."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from services.features.domain.events import Ints
from services.features.domain.layout import Layout, minima, present, summands

# The value of a minimum over nothing.
NO_MINIMUM = np.iinfo(np.int64).max
# A newest record is (occurred_at_us, source, position, value); the time of one that is absent:
NEVER = np.iinfo(np.int64).min
RECORD = 4


@dataclass(frozen=True)
class Aggregates:
    """Partial aggregates over any leading shape.

    sums: int64 [..., sums]; mins: int64 [..., mins]; lasts: int64 [..., lasts, RECORD].
    """

    sums: Ints
    mins: Ints
    lasts: Ints

    @staticmethod
    def nothing(layout: Layout, *shape: int) -> Aggregates:
        """The aggregates over no event at all."""
        return Aggregates(
            np.zeros((*shape, len(layout.sums)), np.int64),
            np.full((*shape, len(layout.mins)), NO_MINIMUM, np.int64),
            np.full((*shape, len(layout.lasts), RECORD), NEVER, np.int64),
        )

    def merge(self, other: Aggregates) -> Aggregates:
        """The aggregates over the events of both."""
        return Aggregates(
            self.sums + other.sums,
            np.minimum(self.mins, other.mins),
            newest(self.lasts, other.lasts),
        )


def newest(a: Ints, b: Ints) -> Ints:
    """Of two arrays of records [..., RECORD] the later ones, by (time, source, position)."""
    if not a.size:
        return a
    later = b[..., 2] > a[..., 2]
    for part in (1, 0):
        later = (b[..., part] > a[..., part]) | ((b[..., part] == a[..., part]) & later)
    return np.where(later[..., None], b, a)


@dataclass(frozen=True)
class RowEvents:
    """`n` events whose entities are rows of the state; otherwise as ViewEvents."""

    rows: Ints
    occurred_at_us: Ints
    source: Ints
    position: Ints
    values: Ints

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, chosen: Ints | npt.NDArray[np.bool_]) -> RowEvents:
        """The chosen events, in the order chosen."""
        return RowEvents(
            self.rows[chosen],
            self.occurred_at_us[chosen],
            self.source[chosen],
            self.position[chosen],
            self.values[:, chosen],
        )

    def in_order(self, layout: Layout) -> RowEvents:
        """Sorted by row and time; where the tie-break can show, by source and position too."""
        return self.take(_order(self, layout.ordered))

    @staticmethod
    def concatenate(parts: list[RowEvents]) -> RowEvents:
        """All events of all parts (at least one)."""
        if len(parts) == 1:
            return parts[0]
        return RowEvents(
            np.concatenate([part.rows for part in parts]),
            np.concatenate([part.occurred_at_us for part in parts]),
            np.concatenate([part.source for part in parts]),
            np.concatenate([part.position for part in parts]),
            np.concatenate([part.values for part in parts], axis=1),
        )

    @staticmethod
    def none(columns: int) -> RowEvents:
        """No events of a view with so many input columns."""
        empty = np.empty(0, np.int64)
        return RowEvents(empty, empty, empty, empty, np.empty((columns, 0), np.int64))


def stacked(events: RowEvents) -> Ints:
    """Events as one array [n, 4 + columns]."""
    fields = (events.rows, events.occurred_at_us, events.source, events.position)
    return np.concatenate([np.stack(fields), events.values]).T


def unstacked(array: Ints) -> RowEvents:
    """What `stacked` was given."""
    fields = np.ascontiguousarray(array.T)
    return RowEvents(fields[0], fields[1], fields[2], fields[3], fields[4:])


def _order(events: RowEvents, ties: bool) -> Ints:
    if not len(events):
        return np.empty(0, np.int64)
    first = int(events.occurred_at_us.min())
    span = int(events.occurred_at_us.max()) - first + 1
    if (int(events.rows.max()) + 1) * span < 2**63:
        # one packed key sorts several times faster than two
        key = events.rows * span + (events.occurred_at_us - first)
        order = np.argsort(key)
        if not ties or not _has_ties(key[order]):
            return order
    return np.lexsort((events.position, events.source, events.occurred_at_us, events.rows))


def _has_ties(ordered: Ints) -> bool:
    return bool(np.any(ordered[1:] == ordered[:-1]))


def reduce_segments(layout: Layout, events: RowEvents, starts: Ints) -> Aggregates:
    """Aggregates of each run of ordered events; `starts` are the first events of the runs."""
    lasts = np.empty((len(starts), len(layout.lasts), RECORD), np.int64)
    for place, (sign, column) in enumerate(layout.lasts):
        lasts[:, place] = records_of_segments(events, sign, column, starts)
    smallest = minima(layout, events.values, events.occurred_at_us, NO_MINIMUM)
    return Aggregates(
        np.add.reduceat(summands(layout, events.values), starts, axis=1).T,
        np.minimum.reduceat(smallest, starts, axis=1).T,
        lasts,
    )


def records_of_segments(events: RowEvents, sign: int, column: int, starts: Ints) -> Ints:
    """The newest (sign 1) or oldest (-1) record of a column in each run: int64 [runs, RECORD]."""
    count = len(events)
    absent = -1 if sign > 0 else count
    at = np.where(present([column], events.values)[0], np.arange(count), absent)
    reduce = np.maximum if sign > 0 else np.minimum
    found = reduce.reduceat(at, starts)
    return records(events, sign, column, np.where(found == count, -1, found))


def records(events: RowEvents, sign: int, column: int, at: Ints) -> Ints:
    """The records of the events `at` (any shape); absent where `at` is negative.

    Of an oldest record (sign -1) time, source and position are negated: it is the newest so.
    """
    out = np.full((*at.shape, RECORD), NEVER, np.int64)
    if not len(events):
        return out
    fields = (events.occurred_at_us, events.source, events.position)
    for part, field in enumerate(fields):
        out[..., part] = sign * field[at]
    out[..., 3] = events.values[column][at] if column >= 0 else 0
    out[at < 0] = NEVER
    return out
