"""Windows over the events of one chunk, as of many points in time at once.

The chunk is sorted once by (entity, time). A window is then a range of neighbours: a sum is the
difference of two running sums, a minimum two look-ups in a sparse table, a newest record the last
one at or before the end of the range. No step depends on how many slices the chunk spans.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from services.features.domain.aggregates import (
    NO_MINIMUM,
    RECORD,
    Aggregates,
    RowEvents,
    records,
)
from services.features.domain.events import Ints
from services.features.domain.layout import Layout, minima, present, summands


class Chunk:
    """The events of a chunk that concern the rows asked for, ready for range queries."""

    def __init__(self, layout: Layout, parts: Sequence[RowEvents], rows: Ints) -> None:
        end = 1 + max(int(part.rows.max(initial=0)) for part in parts)
        wanted = np.zeros(max(end, 1 + int(rows.max())), np.bool_)
        wanted[rows] = True
        chosen = [part.take(wanted[part.rows]) for part in parts]
        self._layout = layout
        self._events = RowEvents.concatenate(chosen).in_order(layout)
        self._starts = np.searchsorted(self._events.rows, rows)
        self._locator = _Locator(rows, self._events)
        self._rows = rows

    def windows(self, first_us: Ints, as_of_us: Ints) -> Aggregates:
        """Aggregates of the events with first <= time < as-of; first: [n, windows], as-of: [n]."""
        low = self._locator.before(self._rows[:, None], first_us)
        high = np.broadcast_to(self._locator.before(self._rows, as_of_us)[:, None], low.shape)
        high = np.maximum(low, high)
        values = self._events.values
        lasts = np.empty((*low.shape, len(self._layout.lasts), RECORD), np.int64)
        for place, column in enumerate(self._layout.lasts):
            lasts[:, :, place] = self._newest(column, low, high)
        return Aggregates(
            _range_sums(summands(self._layout, values), low, high),
            _range_minima(minima(self._layout, values, NO_MINIMUM), low, high),
            lasts,
        )

    def latest(self, as_of_us: Ints) -> Ints:
        """The newest records before the as-of times, whatever their age: [n, latests, RECORD]."""
        high = np.maximum(self._starts, self._locator.before(self._rows, as_of_us))
        out = np.empty((len(high), len(self._layout.latests), RECORD), np.int64)
        for place, column in enumerate(self._layout.latests):
            out[:, place] = self._newest(column, self._starts, high)
        return out

    def _newest(self, column: int, low: Ints, high: Ints) -> Ints:
        count = len(self._events)
        at = np.where(present([column], self._events.values)[0], np.arange(count), -1)
        reached = np.concatenate(([-1], np.maximum.accumulate(at)))[high]
        return records(self._events, column, np.where(reached >= low, reached, -1))


class _Locator:
    """Finds places in ordered events of the rows asked for, through one packed key."""

    def __init__(self, rows: Ints, events: RowEvents) -> None:
        self._rows = np.unique(rows)
        self._times, ranks = np.unique(events.occurred_at_us, return_inverse=True)
        self._keys = self._pack(events.rows, ranks)

    def before(self, rows: Ints, times: Ints) -> Ints:
        """How many events sort before (row, time), in the shape of the arguments' broadcast."""
        ranks = np.searchsorted(self._times, times)
        return np.searchsorted(self._keys, self._pack(rows, ranks))

    def _pack(self, rows: Ints, ranks: Ints) -> Ints:
        # ranks instead of the numbers themselves: the product always fits
        return np.searchsorted(self._rows, rows) * (len(self._times) + 1) + ranks


def _range_sums(values: Ints, low: Ints, high: Ints) -> Ints:
    """Sums of values[:, low:high]: int64 [*low.shape, rows of values]."""
    running = np.zeros((values.shape[1] + 1, values.shape[0]), np.int64)
    np.cumsum(values.T, axis=0, out=running[1:])
    return running.take(high, axis=0) - running.take(low, axis=0)


def _range_minima(values: Ints, low: Ints, high: Ints) -> Ints:
    """Minima of values[:, low:high], NO_MINIMUM over nothing; one pass for each power of two."""
    out = np.full((*low.shape, values.shape[0]), NO_MINIMUM, np.int64)
    if not values.shape[0]:
        return out
    level = np.frexp((high - low).astype(np.float64))[1] - 1
    table = values
    for power in range(int(level.max(initial=-1)) + 1):
        width = 1 << power
        here = np.nonzero(level == power)
        out[here] = np.minimum(table[:, low[here]], table[:, high[here] - width]).T
        table = np.minimum(table[:, :-width], table[:, width:])
    return out
