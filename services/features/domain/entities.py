"""Entity keys and the rows of the state arrays that belong to them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat
from typing import cast

import numpy as np
import polars as pl

from services.features.domain.events import Ints

# Row 0 belongs to no entity and stays empty, so that an unknown entity needs no special case.
NOBODY = 0
# A dictionary slot, a key and a number, roughly.
ENTITY_BYTES = 150


class EntityIndex:
    """A dictionary from key to row; rows that were released are given out again."""

    def __init__(self) -> None:
        self._rows: dict[str, int] = {}
        self._free: list[int] = []
        self._end = 1

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def end(self) -> int:
        """One more than the highest row ever given out: what the arrays must hold."""
        return self._end

    @property
    def keys(self) -> list[str]:
        """All keys, in the order of `rows`."""
        return list(self._rows)

    @property
    def rows(self) -> Ints:
        """The rows of all keys, in the order of `keys`."""
        return np.fromiter(self._rows.values(), np.int64, len(self._rows))

    def find(self, keys: pl.Series) -> Ints:
        """The row of each key; NOBODY for a null or unknown one."""
        return self.find_texts(keys.to_list())

    def find_texts(self, keys: Sequence[str | None]) -> Ints:
        """The same for keys in a list."""
        rows = cast("dict[str | None, int]", self._rows)  # null is no key of it
        return np.fromiter(map(rows.get, keys, repeat(NOBODY)), np.int64, len(keys))

    def find_or_add(self, keys: pl.Series) -> Ints:
        """The row of each key (no nulls), new rows for those not seen before."""
        rows = self.find(keys)
        unknown = np.flatnonzero(rows == NOBODY)
        if len(unknown):
            strangers = keys.gather(unknown)
            for key in strangers.unique(maintain_order=True):
                self._rows[key] = self._next_row()
            rows[unknown] = self.find(strangers)
        return rows

    def release(self, keys: list[str]) -> Ints:
        """Forget these keys; their rows, which the caller clears, are free from now on."""
        rows = [self._rows.pop(key) for key in keys]
        self._free.extend(rows)
        return np.array(rows, np.int64)

    def restore(self, keys: list[str], rows: Ints) -> None:
        """Take over the keys and rows of a snapshot."""
        self._rows = dict(zip(keys, rows.tolist(), strict=True))
        self._end = int(rows.max(initial=0)) + 1
        self._free = np.setdiff1d(np.arange(1, self._end), rows).tolist()

    def memory_bytes(self) -> int:
        """Roughly what the dictionary holds: a slot, a key and a number for each entity."""
        return ENTITY_BYTES * len(self._rows) + 8 * len(self._free)

    def _next_row(self) -> int:
        if self._free:
            return self._free.pop()
        self._end += 1
        return self._end - 1
