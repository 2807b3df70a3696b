"""The events of the entities that are asked for, in order, and what ranges over them are made from.

An event is a row of a frame: entity (a whole number), at (microseconds), source, position, and one
column `value.<name>` an input, in grid units, null where absent.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import polars as pl

from services.features.domain.definitions import FeatureView
from services.features.domain.events import Ints

NOBODY = -1
"""The number of an entity that no event names."""
NOTHING = np.iinfo(np.int64).max
"""A minimum over nothing."""
_ORDER = ("entity", "at", "source", "position")
Mask = npt.NDArray[np.bool_]


class Places:
    """Where (entity, number) would stand among ordered ones."""

    def __init__(self, entities: Ints, numbers: Ints) -> None:
        self._known, ranks = np.unique(numbers, return_inverse=True)
        self._keys = self._packed(entities, ranks)

    def before(self, entities: Ints, numbers: Ints) -> Ints:
        """How many of them come before each; 0 for NOBODY."""
        ranks = np.searchsorted(self._known, numbers)
        return np.searchsorted(self._keys, self._packed(entities, ranks))

    def _packed(self, entities: Ints, ranks: Ints) -> Ints:
        return entities * (len(self._known) + 1) + ranks


class History:
    """Ordered events, cut into the tiles of a view.

    `tile_starts` are the first events of the tiles [tiles + 1], `tile_of` the tile of each event;
    both count from 0 over all entities.
    """

    def __init__(self, view: FeatureView, events: pl.DataFrame) -> None:
        self.view = view
        tile = (pl.col("at") // view.tile_us).alias("tile")
        run = pl.struct("entity", "tile").rle_id().cast(pl.Int64).alias("run")
        self._frame = events.sort(_ORDER).with_columns(tile).with_columns(run)
        tiles = self._frame.group_by("run", maintain_order=True).agg(
            pl.col("entity", "tile").first(), pl.len().alias("events")
        )
        self.entity = self._numbers("entity")
        self.at_us = self._numbers("at")
        self.tile_of = self._numbers("run")
        self.tile_starts = _running(tiles["events"].cast(pl.Int64).to_numpy())
        self.events = Places(self.entity, self.at_us)
        self.tiles = Places(tiles["entity"].to_numpy(), tiles["tile"].to_numpy())
        self._kept: dict[tuple[str, str | None], Ints] = {}

    def __len__(self) -> int:
        return self._frame.height

    def units(self, column: str) -> Ints:
        """Each event's input, 0 where absent."""
        return self._once("units", column, lambda: self._numbers(f"value.{column}"))

    def present(self, column: str | None) -> Mask:
        """Which events have the input; without one, all."""
        if column is None:
            return np.ones(len(self), np.bool_)
        return self._frame[f"value.{column}"].is_not_null().to_numpy()

    def counts(self, column: str | None) -> Ints:
        """How many events before each have the input: [events + 1]."""
        return self._once("counts", column, lambda: _running(self.present(column)))

    def sums(self, column: str) -> Ints:
        """The sum of the inputs before each event, modulo 2**64: [events + 1]."""
        return self._once("sums", column, lambda: _running(self.units(column)))

    def squares(self, column: str, shift: int, mask: int) -> Ints:
        """The same of `(square >> shift) & mask`."""
        return self._once(
            f"squares.{shift}",
            column,
            lambda: _running((self.units(column) ** 2 >> shift) & mask),
        )

    def newest(self, column: str | None) -> Ints:
        """At each event the place of the newest one so far that has the input, else negative."""
        return self._once("newest", column, lambda: self._newest(self.present(column)))

    def oldest(self, column: str | None) -> Ints:
        """At each event the place of the first one from there on that has the input."""
        return self._once("oldest", column, lambda: self._oldest(self.present(column)))

    def least(self, column: str, sign: int) -> Ints:
        """The least `sign * input` of each tile, NOTHING where it has none: [tiles + 1]."""
        return self._once(f"least.{sign}", column, lambda: self._least(column, sign))

    def least_so_far(self, column: str, sign: int) -> Ints:
        """At each event the least `sign * input` of its tile so far, NOTHING if there is none."""
        return self._once(f"so_far.{sign}", column, lambda: self._so_far(column, sign))

    def gap_starts(self, gap_us: int) -> Ints:
        """At each event the first one of its session: none of them follows by more than a gap."""
        return self._once(f"gap.{gap_us}", None, lambda: self._gap_starts(gap_us))

    def _newest(self, here: Mask) -> Ints:
        return np.maximum.accumulate(np.where(here, np.arange(len(self)), NOBODY))

    def _oldest(self, here: Mask) -> Ints:
        at = np.where(here, np.arange(len(self)), len(self))
        return np.minimum.accumulate(at[::-1])[::-1]

    def _least(self, column: str, sign: int) -> Ints:
        least = (sign * pl.col(f"value.{column}")).min().fill_null(NOTHING).alias("least")
        found = self._frame.group_by("run", maintain_order=True).agg(least)["least"].to_numpy()
        return np.append(found, NOTHING)

    def _so_far(self, column: str, sign: int) -> Ints:
        filled = (sign * pl.col(f"value.{column}")).fill_null(NOTHING)
        return self._frame.select(filled.cum_min().over("run")).to_series().to_numpy()

    def _gap_starts(self, gap_us: int) -> Ints:
        apart = np.ones(len(self), np.bool_)
        apart[1:] = self.entity[1:] != self.entity[:-1]
        apart[1:] |= self.at_us[1:] - self.at_us[:-1] > gap_us
        return np.maximum.accumulate(np.where(apart, np.arange(len(self)), 0))

    def _numbers(self, name: str) -> Ints:
        return self._frame[name].cast(pl.Int64).fill_null(0).to_numpy()

    def _once(self, what: str, column: str | None, make: Callable[[], Ints]) -> Ints:
        key = (what, column)
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]


def _running(values: Ints | Mask) -> Ints:
    """Sums of the values before each place: [n + 1]."""
    return np.concatenate((np.zeros(1, np.int64), np.cumsum(values, dtype=np.int64)))
