"""Windows over the events of one chunk, as of many points in time at once.

The chunk is sorted once by (entity, time). A window is then a range of neighbours: a sum is the
difference of two running sums, a minimum two look-ups in a sparse table, a newest record the last
one at or before the end of the range. No step depends on how many slices the chunk spans.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from services.features.domain.aggregates import (
    NEVER,
    NO_MINIMUM,
    RECORD,
    Aggregates,
    RowEvents,
    records,
)
from services.features.domain.events import Ints
from services.features.domain.layout import Layout, minima, present, summands
from services.features.domain.windowed import Extents, Windowed, decayed

# Tiles are looked up in blocks of so many numbers, which stay in the cache.
_BLOCK = 2**17
# The events of so few rows are found sooner by comparing with each.
_FEW = 8
# Above this a packed key would leave int64.
_KEY_LIMIT = 2**63


class Chunk:
    """The events of a chunk that concern the rows asked for, ready for range queries."""

    @staticmethod
    def of(layout: Layout, parts: Sequence[RowEvents], rows: Ints) -> Chunk | None:
        """Those of `parts` that concern the rows; None where none does, which needs no merging."""
        chosen = [part.take(_concerned(part.rows, rows)) for part in parts if len(part)]
        chosen = [part for part in chosen if len(part)]
        return Chunk(layout, RowEvents.concatenate(chosen), rows) if chosen else None

    def __init__(self, layout: Layout, events: RowEvents, rows: Ints) -> None:
        self._layout = layout
        self._events = events.in_order(layout)
        self._starts = np.searchsorted(self._events.rows, rows)
        self._locator = _Locator(rows, self._events)
        self._ranks = self._locator.ranks
        self._summed: Ints | None = None

    def windows(self, extents: Extents) -> Windowed:
        """Aggregates of the events in every window."""
        low = self._locator.before(self._ranks[:, None], extents.first_us)
        high = self._locator.before(self._ranks[:, None], extents.end_us)
        high = np.maximum(low, high)
        events = self._events
        lasts = np.empty((*low.shape, len(self._layout.lasts), RECORD), np.int64)
        for place, (sign, column) in enumerate(self._layout.lasts):
            lasts[:, :, place] = self._record(sign, column, low, high)
        smallest = minima(self._layout, events.values, events.occurred_at_us, NO_MINIMUM)
        found = Aggregates(
            _range_sums(self._running(), low, high), _range_minima(smallest, low, high), lasts
        )
        return Windowed(found, self._decayed(extents))

    def latest(self, as_of_us: Ints) -> Ints:
        """The newest records before the as-of times, whatever their age: [n, latests, RECORD]."""
        high = np.maximum(self._starts, self._locator.before(self._ranks, as_of_us))
        out = np.empty((len(high), len(self._layout.latests), RECORD), np.int64)
        for place, column in enumerate(self._layout.latests):
            out[:, place] = self._record(1, column, self._starts, high)
        return out

    def tile_times(self, extents: Extents, ages: int) -> tuple[Ints, Ints]:
        """The first and last event time of each tile by age, [n, ages]; see `session_ages`."""
        at = self._edges(slice(None), extents, ages)
        newer, older = at[:, :-1], at[:, 1:]
        times = np.append(self._events.occurred_at_us, 0)
        used = newer > older
        first = np.where(used, times[older], NO_MINIMUM)
        return first, np.where(used, times[newer - 1], NEVER)

    def events_of(self, extents: Extents, ages: int) -> tuple[Ints, RowEvents]:
        """The events that each request may see in its newest `ages` tiles, and whose they are."""
        at = self._edges(slice(None), extents, ages)
        high = at[:, 0]
        sizes = np.maximum(high - at[:, -1], 0)
        requests = np.repeat(np.arange(len(high)), sizes)
        first = np.repeat(at[:, -1] - (np.cumsum(sizes) - sizes), sizes)
        return requests, self._events.take(first + np.arange(len(requests)))

    def _edges(self, chosen: slice, extents: Extents, ages: int) -> Ints:
        """How many events sort before each edge of the tiles, newest edge first: [n, ages + 1]."""
        edges = (extents.newest_tile[chosen, None] + 1 - np.arange(ages + 1)) * extents.tile_us
        edges[:, 0] = extents.as_of_us[chosen]
        return self._locator.before(self._ranks[chosen, None], edges)

    def _decayed(self, extents: Extents) -> Ints:
        layout = self._layout
        out = np.zeros((len(self._ranks), len(layout.decays), 3), np.int64)
        ages = max((len(decay.weights) for decay in layout.decays), default=0)
        if not ages:
            return out
        running = self._running()
        step = max(1, _BLOCK // (ages * len(layout.sums)))
        for start in range(0, len(self._ranks), step):
            block = slice(start, start + step)
            found = running.take(self._edges(block, extents, ages), axis=0)
            out[block] = decayed(layout, found[:, :-1] - found[:, 1:])
        return out

    def _running(self) -> Ints:
        """Running sums before each event: int64 [events + 1, sums]."""
        if self._summed is None:
            values = summands(self._layout, self._events.values)
            self._summed = np.zeros((values.shape[1] + 1, values.shape[0]), np.int64)
            np.cumsum(values.T, axis=0, out=self._summed[1:])
        return self._summed

    def _record(self, sign: int, column: int, low: Ints, high: Ints) -> Ints:
        count = len(self._events)
        here = present([column], self._events.values)[0]
        if sign > 0:
            at = np.where(here, np.arange(count), -1)
            reached = np.concatenate(([-1], np.maximum.accumulate(at)))[high]
            found = np.where(reached >= low, reached, -1)
        else:
            at = np.where(here, np.arange(count), count)
            reached = np.append(np.minimum.accumulate(at[::-1])[::-1], count)[low]
            found = np.where(reached < high, reached, -1)
        return records(self._events, sign, column, found)


class _Locator:
    """Finds places in ordered events of the rows asked for, through one packed key.

    `ranks` are those of the rows asked for, which stand for them in the key.
    """

    def __init__(self, rows: Ints, events: RowEvents) -> None:
        known = np.unique(rows) if len(rows) > 1 else rows
        self.ranks = np.searchsorted(known, rows)
        times = events.occurred_at_us
        self._first_us = int(times.min())
        self._span_us = int(times.max()) - self._first_us + 1
        self._times: Ints | None = None
        if len(known) * (self._span_us + 1) >= _KEY_LIMIT:
            self._times = np.unique(times)  # ranks instead of the times: the product always fits
        self._keys = self._pack(np.searchsorted(known, events.rows), times)

    def before(self, ranks: Ints, times_us: Ints) -> Ints:
        """How many events sort before (row, time), in the shape of the arguments' broadcast."""
        return np.searchsorted(self._keys, self._pack(ranks, times_us))

    def _pack(self, ranks: Ints, times_us: Ints) -> Ints:
        if self._times is not None:
            return ranks * (len(self._times) + 1) + np.searchsorted(self._times, times_us)
        offsets = np.minimum(np.maximum(times_us - self._first_us, 0), self._span_us)
        return np.asarray(ranks * (self._span_us + 1) + offsets)


def _range_sums(running: Ints, low: Ints, high: Ints) -> Ints:
    """Sums of the events low to high: int64 [*low.shape, sums]."""
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


def _concerned(of: Ints, rows: Ints) -> npt.NDArray[np.bool_]:
    """Which events are of one of the rows."""
    if len(rows) > _FEW:
        wanted = np.zeros(1 + max(int(of.max()), int(rows.max())), np.bool_)
        wanted[rows] = True
        return wanted[of]
    # a table would be as long as there are entities
    found = np.zeros(len(of), np.bool_)
    for row in dict.fromkeys(rows.tolist()):
        found |= of == row
    return found
