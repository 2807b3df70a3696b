"""Pulsar's message ids as positions: ledger in 31 bits, entry in 20, batch index in 12."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from causemesh.bus.base import Positions
from causemesh.errors import Fatal

_ENTRY_BITS, _BATCH_BITS = 20, 12
_MOST = np.array([(1 << 31) - 1, (1 << _ENTRY_BITS) - 1, (1 << _BATCH_BITS) - 1])


def packed(ids: Sequence[Any]) -> Positions:
    """The positions of message ids. Raises Fatal for a broker whose numbers don't fit."""
    numbers = np.array(
        [(one.ledger_id(), one.entry_id(), max(one.batch_index(), 0)) for one in ids],
        dtype=np.int64,
    )
    if (numbers < 0).any() or (numbers > _MOST).any():
        raise Fatal(
            f"Pulsar's message ids don't fit a position: up to {numbers.max(axis=0).tolist()},"
            f" at most {_MOST.tolist()} do; set managedLedgerMaxEntriesPerLedger below 2^20"
        )
    ledgers: Positions
    entries: Positions
    indices: Positions
    ledgers, entries, indices = numbers.T
    return (ledgers << (_ENTRY_BITS + _BATCH_BITS)) | (entries << _BATCH_BITS) | indices


def packed_one(ledger: int, entry: int, batch_index: int) -> int:
    """One position."""
    return (ledger << (_ENTRY_BITS + _BATCH_BITS)) | (entry << _BATCH_BITS) | max(batch_index, 0)


def unpacked(position: int) -> tuple[int, int, int]:
    """Ledger, entry and batch index."""
    return (
        position >> (_ENTRY_BITS + _BATCH_BITS),
        (position >> _BATCH_BITS) & int(_MOST[1]),
        position & int(_MOST[2]),
    )
