"""Rings of tiles: for every entity the newest tiles of a view, as flat columns.

A slot is `tile modulo ring length`; `held` says which tile a slot holds, so stale slots are never
cleared: they are overwritten by the next tile that falls on them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from services.features.domain.aggregates import NEVER, NO_MINIMUM, RECORD, Aggregates
from services.features.domain.changes import Touched
from services.features.domain.events import Ints
from services.features.domain.layout import Layout
from services.features.domain.windowed import Extents, Windowed, decayed

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
        out = Aggregates.nothing(layout, len(rows), len(layout.spans))
        decays = np.zeros((len(rows), len(layout.decays), 3), np.int64)
        if not self._tiles:
            return Windowed(out, decays)
        width = len(layout.sums) + len(layout.mins) + len(layout.lasts)
        step = max(1, _BLOCK // (self._tiles * max(1, width)))
        for start in range(0, len(rows), step):
            block = slice(start, start + step)
            part = self._block(rows[block], extents.block(block))
            found = part.aggregates
            out.sums[block], out.mins[block], out.lasts[block] = found.sums, found.mins, found.lasts
            decays[block] = part.decayed
        return Windowed(out, decays)

    def tile_minima(self, rows: Ints, newest_tile: Ints, parts: Sequence[int]) -> Ints:
        """Minima of each row's tiles by age: int64 [n, ages, parts], NO_MINIMUM where empty."""
        slots, held = self._slots(rows, newest_tile)
        found = self._data.mins[:, list(parts)].take(slots, axis=0)
        return np.where(held[:, :, None], found, NO_MINIMUM)

    def held_slots(self, rows: Ints, newest_tile: Ints) -> tuple[Ints, Ints, Ints]:
        """Of the tiles by age that are held: whose (index into rows), the age and the slot."""
        slots, held = self._slots(rows, newest_tile)
        owners, ages = np.nonzero(held)
        return owners, ages, slots[owners, ages]

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
        """The slots of each row's tiles by age [n, ages], and whether they hold those tiles."""
        tiles = newest_tile[:, None] - np.arange(self._tiles)
        slots = rows[:, None] * self.length + tiles % self.length
        return slots, self._held[slots] == tiles

    def _block(self, rows: Ints, extents: Extents) -> Windowed:
        slots, held = self._slots(rows, extents.newest_tile)
        sums = self._data.sums.take(slots, axis=0)
        sums *= held[:, :, None]
        mins = np.where(held[:, :, None], self._data.mins.take(slots, axis=0), NO_MINIMUM)
        shape = (len(rows), len(self._layout.spans))
        found = Aggregates(
            np.empty((*shape, sums.shape[2]), np.int64),
            np.empty((*shape, mins.shape[2]), np.int64),
            self._lasts(slots, held, extents),
        )
        self._sliding(sums, mins, found)
        self._placed(sums, mins, extents, found)
        return Windowed(found, decayed(self._layout, sums))

    def _sliding(self, sums: Ints, mins: Ints, out: Aggregates) -> None:
        """Windows that all end with the newest tile: each is the one before it, and some more."""
        count = self._layout.sliding
        if not count:
            return
        spans = self._layout.spans[:count]
        starts, end = np.concatenate(([0], spans[:-1])), spans[-1]
        out.sums[:, :count] = np.add.reduceat(sums[:, :end], starts, axis=1).cumsum(axis=1)
        least = np.minimum.reduceat(mins[:, :end], starts, axis=1)
        out.mins[:, :count] = np.minimum.accumulate(least, axis=1)

    def _placed(self, sums: Ints, mins: Ints, extents: Extents, out: Aggregates) -> None:
        """Windows whose place depends on the request."""
        for window in range(self._layout.sliding, len(self._layout.spans)):
            inside = _inside(extents, window, self._tiles)[:, :, None]
            out.sums[:, window] = (sums * inside).sum(axis=1)
            out.mins[:, window] = np.where(inside, mins, NO_MINIMUM).min(axis=1, initial=NO_MINIMUM)

    def _lasts(self, slots: Ints, held: Mask, extents: Extents) -> Ints:
        """The newest record of each window: it is in the newest tile that has one (the oldest)."""
        spans, count = self._layout.spans, self._layout.sliding
        out = np.full((len(slots), len(spans), len(self._layout.lasts), RECORD), NEVER, np.int64)
        for place, (sign, _) in enumerate(self._layout.lasts):
            has = held & (self._data.lasts[:, place, 0][slots] != NEVER)
            shared = count if sign > 0 else 0
            if shared:
                age = np.where(has.any(axis=1), has.argmax(axis=1), self._tiles)
                found = np.flatnonzero(age < self._tiles)
                newest = self._data.lasts[slots[found, age[found]], place]
                inside = age[found, None] < spans[:count]
                out[found, :count, place] = np.where(inside[:, :, None], newest[:, None], NEVER)
            for window in range(shared, len(spans)):
                if window < count:
                    chosen = has[:, : spans[window]]
                else:
                    chosen = has & _inside(extents, window, self._tiles)
                age = chosen.argmax(axis=1)
                if sign < 0:
                    age = chosen.shape[1] - 1 - chosen[:, ::-1].argmax(axis=1)
                found = np.flatnonzero(chosen[np.arange(len(age)), age])
                age = age[found]
                out[found, window, place] = self._data.lasts[slots[found, age], place]
        return out


def _inside(extents: Extents, window: int, tiles: int) -> Mask:
    """Which ages a window covers: bool [n, ages]."""
    ages = np.arange(tiles)
    return (ages >= extents.low[:, window, None]) & (ages < extents.high[:, window, None])


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
