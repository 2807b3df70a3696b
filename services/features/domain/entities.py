"""Entity keys and the rows of the state arrays that belong to them."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import repeat
from typing import cast

import numpy as np
import polars as pl

from services.features.domain.changes import Touched
from services.features.domain.events import Ints
from services.features.domain.key_table import SLOT_BYTES, KeyTable

# Row 0 belongs to no entity and stays empty, so that an unknown entity needs no special case.
NOBODY = 0
# A dictionary slot, a key, a number and a place in the list of keys, roughly.
_DICTIONARY_BYTES = 158
ENTITY_BYTES = _DICTIONARY_BYTES + 3 * SLOT_BYTES  # slots of the table, about 1.7 to 3.3 an entity
# So few keys are sooner found in the dictionary (measured).
_FEW = 512


class EntityIndex:
    """A dictionary from key to row, the key of each row, and a table for many keys at once.

    A new key gets the lowest free row, so which rows are given out next depends on nothing but the
    keys that are held: a restored index goes on as the one that was saved.
    """

    def __init__(self) -> None:
        self._rows: dict[str, int] = {}
        self._keys: list[str | None] = [None]
        self._table = KeyTable()
        self._free: list[int] = []  # a heap
        self.changed: Touched | None = None
        """Rows given out or released; None where nobody asks."""

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def end(self) -> int:
        """One more than the highest row ever given out: what the arrays must hold."""
        return len(self._keys)

    @property
    def keys(self) -> list[str]:
        """All keys, in the order of `rows`."""
        return [key for key in self._keys if key is not None]

    @property
    def rows(self) -> Ints:
        """The rows of all keys, rising."""
        held = np.ones(self.end, np.bool_)
        held[NOBODY] = False
        held[self._free] = False
        return np.flatnonzero(held)

    def keys_of(self, rows: Ints) -> list[str | None]:
        """The key of each row; None where it has none."""
        return [self._keys[row] for row in rows.tolist()]

    def find(self, keys: pl.Series) -> Ints:
        """The row of each key; NOBODY for a null or unknown one."""
        if len(keys) > _FEW and keys.dtype == pl.String:
            return self._table.find(keys)
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
            new = strangers.unique(maintain_order=True)
            for key in new:
                self._rows[key] = self._next_row(key)
            self._table.put(new, self.find_texts(new.to_list()))
            found = self.find(strangers)
            rows[unknown] = found
            if self.changed is not None:
                self.changed.note(found)
        return rows

    def release(self, rows: Ints) -> None:
        """Forget the keys of these rows, which the caller clears; they are free from now on."""
        keys = pl.Series(self.keys_of(rows), dtype=pl.String)
        self._table.put(keys, np.zeros(len(rows), np.int64))
        for key, row in zip(keys.to_list(), rows.tolist(), strict=True):
            del self._rows[key]
            self._keys[row] = None
            heapq.heappush(self._free, row)
        if self.changed is not None:
            self.changed.note(rows)

    def restore(self, keys: Sequence[str], rows: Ints) -> None:
        """Take over the keys and rows of a snapshot, in place of what there is."""
        self._rows, self._keys = {}, [None]
        self.put(keys, rows)
        self.settle()

    def put(self, keys: Sequence[str | None], rows: Ints) -> None:
        """Give these rows (each once) these keys, None for none. `settle` before the next look."""
        self._keys.extend(repeat(None, int(rows.max(initial=0)) + 1 - self.end))
        places = rows.tolist()
        for row in places:  # all old keys first: one may have moved
            old = self._keys[row]
            if old is not None:
                del self._rows[old]
        for row, key in zip(places, keys, strict=True):
            self._keys[row] = key
            if key is not None:
                self._rows[key] = row

    def settle(self) -> None:
        """Find the free rows and fill the table, after `put`."""
        while len(self._keys) > 1 and self._keys[-1] is None:
            self._keys.pop()
        self._free = [row for row, key in enumerate(self._keys) if key is None][1:]
        self._table = KeyTable()
        self._table.put(pl.Series(self.keys, dtype=pl.String), self.rows)

    def memory_bytes(self) -> int:
        """Roughly what is held: of the dictionary a slot, a key and a number for each entity."""
        return _DICTIONARY_BYTES * len(self._rows) + self._table.nbytes + 8 * len(self._free)

    def _next_row(self, key: str) -> int:
        if self._free:
            row = heapq.heappop(self._free)
            self._keys[row] = key
            return row
        self._keys.append(key)
        return self.end - 1
