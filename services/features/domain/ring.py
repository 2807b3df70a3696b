"""Rings of tiles: for every entity the newest tiles of a view, as flat columns.

A slot is `tile modulo ring length`; `held` says which tile a slot holds, so stale slots are never
cleared: they are overwritten by the next tile that falls on them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from services.features.domain.aggregates import NEVER, NO_MINIMUM, Aggregates
from services.features.domain.changes import Touched
from services.features.domain.events import Ints
from services.features.domain.layout import Layout
from services.features.domain.tile_windows import NOTHING, TileWindows
from services.features.domain.windowed import Extents, Windowed

Mask = npt.NDArray[np.bool_]
EMPTY = np.iinfo(np.int64).min
# One more slot than the longest window needs: a live request that is a little older than the
# newest tile still finds its oldest one.
_SPARE = 1
# Answers gather requests x tiles x primitives; blocks of this many numbers stay in the cache.
_BLOCK = 2**17


def ring_length(tiles: int) -> int:
    """Slots for each entity."""
    return tiles + _SPARE if tiles else 0


class TileRing:
    """The tiles of all entities of one view. `tiles` is the longest window, in tiles (0: none)."""

    def __init__(self, layout: Layout, tiles: int) -> None:
        self._layout = layout
        self.length = ring_length(tiles)
        self._tiles = tiles
        self._ages = np.arange(self.length)[:, None]
        self._wheel = _wheel(self.length)
        self._windows = TileWindows(layout, tiles)
        self._held = np.empty(0, np.int64)
        self._data = Aggregates.nothing(layout, 0)
        self.touched: Touched | None = None
        """Slots that were written; None where nobody asks."""
        self.ensure(1)

    def ensure(self, rows: int) -> None:
        """Make room for so many entity rows; existing tiles stay."""
        have, need = len(self._held), rows * self.length
        if need <= have:
            return
        self._held = _grown(self._held, need)
        self._held[have:] = EMPTY
        # the rest stays unwritten memory: only slots that `held` names are read
        self._data = Aggregates(
            _grown(self._data.sums, need),
            _grown(self._data.mins, need),
            _grown(self._data.lasts, need),
        )
        if not have:  # what a tile that is not held is answered from
            self._data.sums[NOTHING] = 0
            self._data.mins[NOTHING] = NO_MINIMUM
            self._data.lasts[NOTHING] = NEVER

    def merge(self, rows: Ints, tiles: Ints, parts: Aggregates) -> Mask:
        """Add aggregates to (row, tile) slots, each slot named once; False where it was too old."""
        slots = rows * self.length + tiles % self.length
        held = self._held[slots]
        fresh = held <= tiles
        if not fresh.all():
            slots, tiles, held = slots[fresh], tiles[fresh], held[fresh]
            parts = Aggregates(parts.sums[fresh], parts.mins[fresh], parts.lasts[fresh])
        same = np.flatnonzero(held == tiles)
        if len(same):
            parts = _merge_some(parts, same, self._at(slots[same]))
        self._write(slots, tiles, parts)
        if self.touched is not None:
            self.touched.note(slots)
        return np.asarray(fresh)

    def put(self, rows: Ints, tiles: Ints, parts: Aggregates) -> None:
        """Write (row, tile) slots, whatever they held."""
        self._write(rows * self.length + tiles % self.length, tiles, parts)

    def windows(self, rows: Ints, extents: Extents) -> Windowed:
        """Aggregates of every window of each row."""
        layout = self._layout
        if not self._tiles:
            found = Aggregates.nothing(layout, len(rows), len(layout.spans))
            return Windowed(found, np.zeros((len(rows), len(layout.decays), 3), np.int64))
        width = len(layout.sums) + len(layout.mins) + len(layout.lasts)
        step = max(1, _BLOCK // (self._tiles * max(1, width)))
        if len(rows) <= step:
            return self._over(rows, extents)
        blocks = [slice(start, start + step) for start in range(0, len(rows), step)]
        return Windowed.concatenate([self._over(rows[b], extents.block(b)) for b in blocks])

    def _over(self, rows: Ints, extents: Extents) -> Windowed:
        slots, held = self._slots(rows, extents.newest_tile)
        return self._windows.over(self._data, np.where(held, slots, NOTHING), extents)

    def tile_minima(self, rows: Ints, newest_tile: Ints, parts: Sequence[int]) -> Ints:
        """Minima of each row's tiles by age: int64 [n, ages, parts], NO_MINIMUM where empty."""
        slots, held = self._slots(rows, newest_tile)
        found = self._data.mins.take(np.where(held, slots, NOTHING)[:-1].T, axis=0)
        return np.asarray(found[:, :, list(parts)])

    def held_slots(self, rows: Ints, newest_tile: Ints) -> tuple[Ints, Ints, Ints]:
        """Of the tiles by age that are held: whose (index into rows), the age and the slot."""
        slots, held = self._slots(rows, newest_tile)
        owners, ages = np.nonzero(held.T)
        return owners, ages, slots[ages, owners]

    @property
    def held(self) -> Ints:
        """Which tile each slot holds, EMPTY for none; read only."""
        return self._held

    def clear(self, rows: Ints | slice) -> None:
        """Empty all tiles of these rows."""
        if self.length:
            self._held.reshape(-1, self.length)[rows] = EMPTY

    def newest_tiles(self, rows: Ints) -> Ints:
        """The newest tile each row holds, EMPTY for none."""
        if not self.length:
            return np.full(len(rows), EMPTY, np.int64)
        return np.asarray(self._held.reshape(-1, self.length)[rows].max(axis=1, initial=EMPTY))

    def occupied(self, rows: slice = slice(0, None)) -> Ints:
        """The slots of these rows (all) that hold a tile, rising."""
        first = rows.start * self.length
        end = None if rows.stop is None else rows.stop * self.length
        return np.asarray(np.flatnonzero(self._held[first:end] != EMPTY) + first)

    def tiles_at(self, slots: Ints) -> tuple[Ints, Ints, Aggregates]:
        """Row, tile and what it holds of each slot in use."""
        return slots // max(1, self.length), self._held[slots], self._at(slots)

    def memory_bytes(self) -> int:
        """Bytes of the arrays."""
        data = self._data
        return self._held.nbytes + data.sums.nbytes + data.mins.nbytes + data.lasts.nbytes

    def _write(self, slots: Ints, tiles: Ints, parts: Aggregates) -> None:
        self._held[slots] = tiles
        self._data.sums[slots] = parts.sums
        self._data.mins[slots] = parts.mins
        self._data.lasts[slots] = parts.lasts

    def _at(self, slots: Ints) -> Aggregates:
        # `take` copies whole rows; fancy indexing would go element by element
        data = self._data
        return Aggregates(
            data.sums.take(slots, axis=0),
            data.mins.take(slots, axis=0),
            data.lasts.take(slots, axis=0),
        )

    def _slots(self, rows: Ints, newest_tile: Ints) -> tuple[Ints, Mask]:
        """The slots of each row's tiles by age, and whether they hold those tiles.

        Both [ages + 1, n]: the last is the spare tile's, which no window reaches and none holds.
        """
        wheel = self._wheel[newest_tile % self.length]
        slots = np.add(wheel.T, rows * self.length, order="C")
        held = self._held.take(slots) == newest_tile - self._ages
        held[-1] = False
        return slots, held


def _merge_some(parts: Aggregates, at: Ints, others: Aggregates) -> Aggregates:
    """`parts` with the rows `at` merged with `others`."""
    merged = Aggregates(parts.sums[at], parts.mins[at], parts.lasts[at]).merge(others)
    whole = Aggregates(parts.sums.copy(), parts.mins.copy(), parts.lasts.copy())
    whole.sums[at], whole.mins[at], whole.lasts[at] = merged.sums, merged.mins, merged.lasts
    return whole


def _grown(array: Ints, length: int) -> Ints:
    grown = np.empty((length, *array.shape[1:]), np.int64)
    grown[: len(array)] = array
    return grown


def _wheel(length: int) -> Ints:
    """The slots of the newest tiles, newest first, by the slot of the newest: [length, length]."""
    if not length:
        return np.empty((0, 0), np.int64)
    downwards = np.tile(np.arange(length)[::-1], 2)
    # rows of a turning wheel share their memory: a table of its own would grow as tiles squared
    return np.lib.stride_tricks.sliding_window_view(downwards, length)[:length][::-1]
