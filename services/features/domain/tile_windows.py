"""What the tiles of a ring say about every window of many requests at once.

Tiles come by age, the newest first, each with all requests in one piece; a tile that is not held is
given by a slot that holds the aggregates over nothing, so no step needs to know which are there.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from services.features.domain.aggregates import NEVER, NO_MINIMUM, RECORD, Aggregates
from services.features.domain.events import Ints
from services.features.domain.layout import Layout
from services.features.domain.windowed import Extents, Windowed, decayed

Mask = npt.NDArray[np.bool_]
# The slot of the aggregates over nothing: the first one of row NOBODY, which no event reaches.
NOTHING = 0
# Below so many numbers a tile, one call for all windows is sooner done than one for each.
_FEW = 64


class TileWindows:
    """The windows of one view over `tiles` tiles by age; holds what depends on the view alone."""

    def __init__(self, layout: Layout, tiles: int) -> None:
        self._layout = layout
        self._tiles = tiles
        self._ages = np.arange(tiles)[:, None]
        # sliding windows are nested: each is the one before it, and the tiles of a range
        self._ends = layout.spans[: layout.sliding]
        self._starts = np.append(np.zeros(1, np.int64), self._ends)[: len(self._ends)]
        self._ranges = list(zip(self._starts.tolist(), self._ends.tolist(), strict=True))
        signs = np.array([sign for sign, _ in layout.lasts], np.int64)
        self._signed_ages = self._ages[:, :, None] * signs[:, None]
        # where a column is counted, a count says whether a tile has a record of it
        counts = {column: at for at, (kind, column) in enumerate(layout.sums) if kind == "count"}
        self._counts = [counts.get(column) for _, column in layout.lasts]

    def over(self, data: Aggregates, slots: Ints, extents: Extents) -> Windowed:
        """Aggregates of every window from slots of `data`.

        slots: [ages + 1, n], the last row NOTHING.
        """
        placed = [
            self._inside(extents, window)
            for window in range(len(self._ranges), len(self._layout.spans))
        ]
        by_part = [inside[:, :, None] for inside in placed]
        tiles = slots[:-1]
        # `take` copies whole rows; fancy indexing would go element by element
        sums = data.sums.take(tiles, axis=0)
        mins = data.mins.take(tiles, axis=0)
        found = Aggregates(
            self._reduced(np.add, sums, 0, by_part).swapaxes(0, 1),
            self._reduced(np.minimum, mins, NO_MINIMUM, by_part).swapaxes(0, 1),
            self._lasts(data.lasts, sums, slots, placed),
        )
        return Windowed(found, decayed(self._layout, sums.swapaxes(0, 1)))

    def _inside(self, extents: Extents, window: int) -> Mask:
        """Which ages a window covers: bool [ages, n]."""
        low, high = extents.low[:, window], extents.high[:, window]
        return np.asarray((self._ages >= low) & (self._ages < high))

    def _reduced(self, op: np.ufunc, values: Ints, empty: int, placed: Sequence[Mask]) -> Ints:
        """Values [ages, ...] over each window: [windows, ...]; `placed` say which ages count."""
        sliding, shape = len(self._ranges), values.shape[1:]
        out = np.empty((sliding + len(placed), *shape), np.int64)
        if not out.size:
            return out
        if sliding and out[0].size <= _FEW:
            rings = op.reduceat(values[: self._ends[-1]], self._starts, axis=0)
            op.accumulate(rings, axis=0, out=out[:sliding])
        else:
            for window, (start, end) in enumerate(self._ranges):
                op.reduce(values[start:end], axis=0, out=out[window])
                if window:
                    op(out[window], out[window - 1], out=out[window])
        for window, inside in enumerate(placed, sliding):
            op.reduce(np.where(inside, values, empty), axis=0, out=out[window])
        return out

    def _lasts(self, lasts: Ints, sums: Ints, slots: Ints, placed: Sequence[Mask]) -> Ints:
        """The newest record of each window is in its newest tile that has one (the oldest)."""
        count, width = slots.shape[1], len(self._counts)
        windows = len(self._layout.spans)
        if not width:
            return np.empty((count, windows, 0, RECORD), np.int64)
        has = np.empty((self._tiles, width, count), np.bool_)
        for place, counted in enumerate(self._counts):
            if counted is None:
                times = lasts.reshape(-1).take(slots[:-1] * (width * RECORD) + place * RECORD)
                np.not_equal(times, NEVER, out=has[:, place])
            else:
                np.not_equal(sums[:, :, counted], 0, out=has[:, place])
        # ages by sign, so that of newest and oldest the least counts; none is older than `tiles`
        ages = np.where(has, self._signed_ages, self._tiles)
        by_last = [inside[:, None] for inside in placed]
        found = np.abs(self._reduced(np.minimum, ages, self._tiles, by_last))
        found *= count
        found += np.arange(count)
        at = slots.reshape(-1).take(found) * width + np.arange(width)[:, None]
        return lasts.reshape(-1, RECORD).take(at, axis=0).transpose(2, 0, 1, 3)
