"""Where the cells of sketches are kept: sorted columns, merged like a log-structured tree.

A cell belongs to a slot of the ring (entity and tile). Dense registers would cost their full size
for every tile of every entity; most entities hit a few cells of a tile, so only those are kept, at
32 bytes each. New cells come as a sorted run; runs of like size are merged, so a cell is copied
a logarithmic number of times, and an answer searches a logarithmic number of runs. A cell whose
slot has gone on to a newer tile, or whose tile no window can see, is left out at the next merge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from services.features.domain.events import Ints
from services.features.domain.sketches import CROWDED, MAX_VALUES, SketchKind

_CELL_BYTES = 32


@dataclass(frozen=True)
class Cells:
    """Cells in order: owner (a slot, or what an answer asks for), tile, cell and value."""

    owners: Ints
    tiles: Ints
    cells: Ints
    values: Ints

    def __len__(self) -> int:
        return len(self.owners)

    def take(self, chosen: Ints) -> Cells:
        """The chosen cells, in the order chosen."""
        return Cells(
            self.owners[chosen], self.tiles[chosen], self.cells[chosen], self.values[chosen]
        )

    def frame(self) -> pl.DataFrame:
        """The same as a frame."""
        return pl.DataFrame(
            {"owner": self.owners, "tile": self.tiles, "cell": self.cells, "value": self.values}
        )

    def part(self, places: slice) -> Cells:
        """A range of the cells, without copying."""
        return Cells(
            self.owners[places], self.tiles[places], self.cells[places], self.values[places]
        )

    def stacked(self) -> Ints:
        """The same as one array [4, n]."""
        return np.stack([self.owners, self.tiles, self.cells, self.values])

    @staticmethod
    def from_frame(frame: pl.DataFrame) -> Cells:
        """What `frame` wrote, read back."""
        return Cells(*(series.to_numpy(writable=True) for series in frame.get_columns()))

    @staticmethod
    def none() -> Cells:
        """No cells."""
        empty = np.empty(0, np.int64)
        return Cells(empty, empty, empty, empty)

    @staticmethod
    def concatenate(parts: Sequence[Cells]) -> Cells:
        """All cells of all parts."""
        if len(parts) == 1:
            return parts[0]
        return Cells(
            np.concatenate([part.owners for part in parts]),
            np.concatenate([part.tiles for part in parts]),
            np.concatenate([part.cells for part in parts]),
            np.concatenate([part.values for part in parts]),
        )


def reduced(kind: SketchKind, cells: Cells) -> Cells:
    """Each (owner, cell) once, in order; of one owner all cells are of one tile, or it is moot."""
    if not len(cells):
        return cells
    order = _order(cells)
    owners, keys = cells.owners[order], cells.cells[order]
    changed = np.ones(len(order), np.bool_)
    changed[1:] = (owners[1:] != owners[:-1]) | (keys[1:] != keys[:-1])
    starts = np.flatnonzero(changed)
    merge = np.maximum if kind == "registers" else np.add
    values = merge.reduceat(cells.values[order], starts)
    return Cells(owners[starts], cells.tiles[order][starts], keys[starts], values)


def uncrowded(cells: Cells) -> Cells:
    """Reduced cells of values, with one CROWDED cell in place of too many of one owner."""
    if not len(cells):
        return cells
    starts = np.flatnonzero(np.diff(cells.owners, prepend=cells.owners[0] - 1))
    sizes = np.diff(starts, append=len(cells))
    crowded = (sizes > MAX_VALUES) | (cells.cells[starts] == CROWDED)
    if not crowded.any():
        return cells
    keep = np.repeat(~crowded, sizes)
    keep[starts] = True
    keys = cells.cells.copy()
    keys[starts[crowded]] = CROWDED
    values = np.where(keys == CROWDED, 1, cells.values)
    return Cells(cells.owners, cells.tiles, keys, values).take(np.flatnonzero(keep))


def _order(cells: Cells) -> Ints:
    low, high = int(cells.cells.min()), int(cells.cells.max())
    span = high - low + 1
    if (int(cells.owners.max()) + 1) * span < 2**63:
        # one packed key sorts several times faster than two
        return np.argsort(cells.owners * span + (cells.cells - low))
    return np.lexsort((cells.cells, cells.owners))


class CellStore:
    """All cells of one sketch of a view."""

    def __init__(self, kind: SketchKind) -> None:
        self.kind: SketchKind = kind
        self._runs: list[Cells] = []
        self.unsaved: list[Cells] | None = None
        """What was added since the last checkpoint; None where nobody asks."""

    def __len__(self) -> int:
        return sum(map(len, self._runs))

    def add(self, cells: Cells, held: Ints, oldest_tile: int) -> None:
        """Take cells of slots that hold their tile; `held` says which tile every slot holds now.

        Tiles up to `oldest_tile` may be forgotten.
        """
        if not len(cells):
            return
        run = self._reduced(cells)
        self._runs.append(run)
        if self.unsaved is not None:
            self.unsaved.append(run)
        while len(self._runs) > 1 and len(self._runs[-2]) <= 2 * len(self._runs[-1]):
            both = Cells.concatenate(self._runs[-2:])
            self._runs[-2:] = [self._reduced(_alive(both, held, oldest_tile))]

    def find(self, slots: Ints, tiles: Ints) -> tuple[Ints, Cells]:
        """The cells of these slots that are of these tiles, and of which of the slots each is."""
        places, parts = [np.empty(0, np.int64)], [Cells.none()]
        for run in self._runs:
            starts = np.searchsorted(run.owners, slots)
            sizes = np.searchsorted(run.owners, slots, side="right") - starts
            place = np.repeat(np.arange(len(slots)), sizes)
            at = np.arange(len(place)) + np.repeat(starts - (np.cumsum(sizes) - sizes), sizes)
            right = run.tiles[at] == tiles[place]
            places.append(place[right])
            parts.append(run.take(at[right]))
        return np.concatenate(places), Cells.concatenate(parts)

    def forget(self, rows: Ints, length: int) -> None:
        """Drop the cells of these rows, whose slots are `length` to a row."""
        self._runs = _without(self._runs, rows, length)
        if self.unsaved is not None:
            self.unsaved = _without(self.unsaved, rows, length)

    def forget_slots(self, slots: slice) -> None:
        """Drop the cells of a range of slots."""
        kept = []
        for run in self._runs:
            inside = _inside(run, slots)
            left = run
            if inside.start < inside.stop:
                places = np.arange(len(run))
                left = run.take(np.delete(places, inside))
            kept.append(left)
        self._runs = [run for run in kept if len(run)]

    def dump(self, held: Ints, oldest_tile: int, slots: slice = slice(0, None)) -> Cells:
        """All cells (of a range of slots) that an answer may still see, each once."""
        both = Cells.concatenate(
            [Cells.none(), *(run.part(_inside(run, slots)) for run in self._runs)]
        )
        return self._reduced(_alive(both, held, oldest_tile))

    def take_unsaved(self, held: Ints, oldest_tile: int) -> Cells:
        """What was added since the last checkpoint, less what no answer sees: a cell may be there
        twice (see `once`). Starts again."""
        found, self.unsaved = self.unsaved or [], []
        return _alive(Cells.concatenate([Cells.none(), *found]), held, oldest_tile)

    def once(self, cells: Cells) -> Cells:
        """Each cell once, in order."""
        return self._reduced(cells)

    def load(self, cells: Cells) -> None:
        """Take over what `dump` gave, its slots as they are now."""
        self._runs = [self._reduced(cells)] if len(cells) else []

    def memory_bytes(self) -> int:
        """Bytes of the columns."""
        return _CELL_BYTES * len(self)

    def _reduced(self, cells: Cells) -> Cells:
        found = reduced(self.kind, cells)
        return uncrowded(found) if self.kind == "values" else found


def _inside(run: Cells, slots: slice) -> slice:
    """Where the cells of a range of slots lie in a run."""
    first = int(np.searchsorted(run.owners, slots.start))
    if slots.stop is None:
        return slice(first, len(run))
    return slice(first, int(np.searchsorted(run.owners, slots.stop)))


def _without(runs: Sequence[Cells], rows: Ints, length: int) -> list[Cells]:
    """Runs less the cells of these rows."""
    kept = [run.take(np.flatnonzero(~np.isin(run.owners // length, rows))) for run in runs]
    return [run for run in kept if len(run)]


def _alive(cells: Cells, held: Ints, oldest_tile: int) -> Cells:
    """The cells whose slots still hold their tile, if an answer may see it."""
    alive = (held[cells.owners] == cells.tiles) & (cells.tiles > oldest_tile)
    return cells.take(np.flatnonzero(alive))
