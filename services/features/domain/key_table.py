"""Rows by the hashes of their keys, for many keys at once.

A dictionary follows three pointers a key, each to memory that is in no cache once there are many
entities: 1.1 us a key at two million (measured). Here a batch of keys is hashed in columns, and its
hashes are looked up together, so that the processor waits for many of them at a time.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from services.features.domain.events import Ints

_SEEDS = 1, 2
_LEAST = 1_024
# Slots taken at most, released ones among them, before there are twice as many.
_FULL = 0.6
SLOT_BYTES = 16
"""A hash, a check and a row."""

_Hashes = npt.NDArray[np.uint64]
_Checks = npt.NDArray[np.uint32]


class KeyTable:
    """Open addressing with linear probing. Row 0 stands for no row.

    A key is known by 96 bits of two hashes. That two of two million keys agree in all of them has a
    chance of about 3e-17.
    """

    def __init__(self) -> None:
        self._allocate(_LEAST)

    def _allocate(self, slots: int) -> None:
        self._hashes: _Hashes = np.zeros(slots, np.uint64)  # 0 in a slot that was never taken
        self._checks: _Checks = np.zeros(slots, np.uint32)
        self._rows = np.zeros(slots, np.int32)  # 0 in a slot whose row was released, too
        self._mask = np.uint64(slots - 1)
        self._taken = 0

    @property
    def nbytes(self) -> int:
        """Memory that is held."""
        return len(self._hashes) * SLOT_BYTES

    def find(self, keys: pl.Series) -> Ints:
        """The row of each key: int64 [n]; 0 for one that has none."""
        hashes, checks = _hashed(keys)
        at = self._places(hashes, checks)
        return np.where(self._same(at, hashes, checks), self._rows[at], 0).astype(np.int64)

    def put(self, keys: pl.Series, rows: Ints) -> None:
        """Give each key, all different, its row; 0 to forget it."""
        hashes, checks = _hashed(keys)
        self._grow(len(hashes))
        self._put(hashes, checks, rows.astype(np.int32))

    def _grow(self, more: int) -> None:
        if self._taken + more <= _FULL * len(self._hashes):
            return
        held = np.flatnonzero(self._rows)
        kept = self._hashes[held], self._checks[held], self._rows[held]
        slots = len(self._hashes)
        while len(held) + more > _FULL * slots:
            slots *= 2
        self._allocate(slots)
        self._put(*kept)

    def _put(self, hashes: _Hashes, checks: _Checks, rows: npt.NDArray[np.int32]) -> None:
        at = self._places(hashes, checks)
        left = np.arange(len(at))
        while len(left):
            empty = self._hashes[at[left]] == 0
            new = left[empty]
            # of keys that come to the same empty slot the one written last stays in it
            self._hashes[at[new]] = hashes[new]
            self._checks[at[new]] = checks[new]
            there = self._same(at[left], hashes[left], checks[left])
            done = left[there]
            self._rows[at[done]] = rows[done]
            self._taken += int(np.count_nonzero(there & empty))
            left = left[~there]
            at[left] = self._places(hashes[left], checks[left], at[left])

    def _places(self, hashes: _Hashes, checks: _Checks, at: Ints | None = None) -> Ints:
        """The slot of each key, from `at` on: its own, else the first that was never taken."""
        if at is None:
            at = (hashes & self._mask).astype(np.int64)
        left = self._lost(at, hashes, checks, None)
        mask = int(self._mask)
        while len(left):
            at[left] = (at[left] + 1) & mask
            left = self._lost(at, hashes, checks, left)
        return at

    def _lost(self, at: Ints, hashes: _Hashes, checks: _Checks, of: Ints | None) -> Ints:
        """Which of these look at another's slot."""
        if of is not None:
            at, hashes, checks = at[of], hashes[of], checks[of]
        found = self._hashes[at]
        other = found != 0
        other &= (found != hashes) | (self._checks[at] != checks)
        lost = np.flatnonzero(other)
        return lost if of is None else of[lost]

    def _same(self, at: Ints, hashes: _Hashes, checks: _Checks) -> Any:
        return (self._hashes[at] == hashes) & (self._checks[at] == checks)


def _hashed(keys: pl.Series) -> tuple[_Hashes, _Checks]:
    first, second = (keys.hash(seed).to_numpy() for seed in _SEEDS)
    # never 0, which says that a slot is empty
    return np.maximum(first, np.uint64(1)), second.astype(np.uint32)
