"""The sketches of a view: cells of events go in, what requests find in their windows comes out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl

from services.features.domain.aggregates import RowEvents
from services.features.domain.cells import Cells, CellStore, reduced, uncrowded
from services.features.domain.chunk import Chunk
from services.features.domain.events import NULL, Ints
from services.features.domain.layout import Layout
from services.features.domain.ring import TileRing
from services.features.domain.sketches import SketchKind, cells_of
from services.features.domain.windowed import Extents

# Requests that are answered together: each brings all cells of its windows.
BLOCK = 128


class ViewSketches:
    """The cell stores of a view, beside its ring, which says what every slot holds."""

    def __init__(self, layout: Layout, ring: TileRing) -> None:
        self._layout = layout
        self._ring = ring
        self.stores = [CellStore(kind) for kind, _ in layout.sketches]

    def add(self, events: RowEvents, tiles: Ints, oldest_tile: int) -> None:
        """Take events whose tiles were merged into the ring; others are left out."""
        if not self.stores:
            return
        slots = events.rows * self._ring.length + tiles % self._ring.length
        held = self._ring.held[slots] == tiles
        for store, (kind, column) in zip(self.stores, self._layout.sketches, strict=True):
            chosen = np.flatnonzero(held & (events.values[column] != NULL))
            cells, values = cells_of(kind, events.values[column][chosen])
            found = Cells(slots[chosen], tiles[chosen], cells, values)
            store.add(found, self._ring.held, oldest_tile)

    def merge(self, other: ViewSketches, rows: Ints, oldest_tile: int) -> None:
        """Take the cells of another state's sketches, whose tiles were merged into the ring.

        `rows`: our row of each of the other's, by its number. Tiles up to `oldest_tile` may be
        forgotten.
        """
        length, held = self._ring.length, self._ring.held
        for store, theirs in zip(self.stores, other.stores, strict=True):
            cells = theirs.dump(other._ring.held, oldest_tile)
            slots = rows[cells.owners // length] * length + cells.tiles % length
            found = Cells(slots, cells.tiles, cells.cells, cells.values)
            store.add(found.take(np.flatnonzero(held[slots] == cells.tiles)), held, oldest_tile)

    def forget(self, rows: Ints) -> None:
        """Drop the cells of these rows."""
        for store in self.stores if len(rows) else ():
            store.forget(rows, self._ring.length)

    def forget_range(self, rows: slice) -> None:
        """Drop the cells of a range of rows."""
        for store in self.stores:
            store.forget_slots(self._slots(rows))

    def track(self) -> None:
        """Begin to note what is added."""
        for store in self.stores:
            store.unsaved = []

    def dump(self, oldest_tile: int, rows: slice) -> list[Cells]:
        """The cells of a range of rows that an answer may still see."""
        return [s.dump(self._ring.held, oldest_tile, self._slots(rows)) for s in self.stores]

    def take_unsaved(self, oldest_tile: int) -> list[Cells]:
        """What was added since the last checkpoint."""
        return [store.take_unsaved(self._ring.held, oldest_tile) for store in self.stores]

    def put(self, arrays: Mapping[str, Ints], oldest_tile: int) -> None:
        """Add what `arrays` told, of slots that hold their tile."""
        for place, store in enumerate(self.stores):
            told = arrays.get(_frame_name(place))
            if told is not None:
                store.add(Cells(*told), self._ring.held, oldest_tile)

    def arrays(self, cells: Sequence[Cells]) -> dict[str, Ints]:
        """Cells of each store, less empty ones: int64 [4, n]; needs nothing of the state."""
        return {
            _frame_name(place): store.once(cells[place]).stacked()
            for place, store in enumerate(self.stores)
            if len(cells[place])
        }

    def _slots(self, rows: slice) -> slice:
        return slice(rows.start * self._ring.length, rows.stop * self._ring.length)

    def answer(self, rows: Ints, extents: Extents, chunk: Chunk | None) -> SketchAnswers:
        """What the requests' rows find, in the state and in the chunk."""
        ages = self._ring.length
        requests, age, slots = self._ring.held_slots(rows, extents.newest_tile)
        tiles = extents.newest_tile[requests] - age
        found = []
        for store, (kind, column) in zip(self.stores, self._layout.sketches, strict=True):
            places, cells = store.find(slots, tiles)
            owners = requests[places] * ages + age[places]
            parts = [Cells(owners, cells.tiles, cells.cells, cells.values)]
            if chunk is not None:
                parts.append(_of_chunk(kind, column, extents, chunk, ages))
            found.append(_by_tile(kind, Cells.concatenate(parts)))
        return SketchAnswers(self._layout, extents, ages, found)

    def frames(self, oldest_tile: int) -> dict[str, pl.DataFrame]:
        """The cells that an answer may still see, as the frames of a snapshot."""
        return {
            _frame_name(place): store.dump(self._ring.held, oldest_tile).frame()
            for place, store in enumerate(self.stores)
        }

    def load(self, frames: Mapping[str, pl.DataFrame]) -> None:
        """Take over the frames of a snapshot, whose rows are the same."""
        for place, store in enumerate(self.stores):
            store.load(Cells.from_frame(frames[_frame_name(place)]))

    def memory_bytes(self) -> int:
        """Bytes of all cells."""
        return sum(store.memory_bytes() for store in self.stores)


def _frame_name(place: int) -> str:
    return f"cells.{place}"


def _of_chunk(kind: SketchKind, column: int, extents: Extents, chunk: Chunk, ages: int) -> Cells:
    requests, events = chunk.events_of(extents, ages)
    chosen = np.flatnonzero(events.values[column] != NULL)
    requests, events = requests[chosen], events.take(chosen)
    tiles = events.occurred_at_us // extents.tile_us
    cells, values = cells_of(kind, events.values[column])
    owners = requests * ages + extents.newest_tile[requests] - tiles
    return Cells(owners, tiles, cells, values)


def _by_tile(kind: SketchKind, cells: Cells) -> Cells:
    """Of values, whether a tile is crowded shows only when all its cells are together."""
    return uncrowded(reduced(kind, cells)) if kind == "values" else cells


class SketchAnswers:
    """The cells that requests found, by tile; merged for one window when a feature asks for it."""

    def __init__(self, layout: Layout, extents: Extents, ages: int, found: list[Cells]) -> None:
        self._layout = layout
        self._extents = extents
        self._ages = ages
        self._found = found
        self._merged: dict[tuple[int, int], Cells] = {}

    def cells(self, sketch: int, window: int) -> Cells:
        """The cells that each request finds in a window, each once; owners are the requests."""
        key = (sketch, window)
        if key not in self._merged:
            self._merged[key] = self._merge(sketch, window)
        return self._merged[key]

    def _merge(self, sketch: int, window: int) -> Cells:
        cells = self._found[sketch]
        requests, age = np.divmod(cells.owners, self._ages)
        low, high = self._extents.low[:, window], self._extents.high[:, window]
        inside = np.flatnonzero((age >= low[requests]) & (age < high[requests]))
        chosen = cells.take(inside)
        kind, _ = self._layout.sketches[sketch]
        return reduced(kind, Cells(requests[inside], chosen.tiles, chosen.cells, chosen.values))
