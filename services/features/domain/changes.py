"""What was touched since the last checkpoint, at the cost of keeping a reference."""

from __future__ import annotations

import numpy as np

from services.features.domain.events import Ints

_MANY = 2**20
# Looking through a mask of all places is cheaper than sorting this part of them (measured).
_DENSE = 64


class Touched:
    """Places of an array (rows, slots), noted any number of times."""

    def __init__(self) -> None:
        self._parts: list[Ints] = []
        self._noted = 0
        self._settled = 0

    def note(self, places: Ints) -> None:
        """Remember these; the array must not be changed afterwards."""
        self._parts.append(places)
        self._noted += len(places)
        if self._noted > _MANY + 2 * self._settled:
            self._parts = [_once(self._parts, self._noted)]
            self._noted = self._settled = len(self._parts[0])

    def take(self) -> Ints:
        """All of them, rising, each once; and start again."""
        found = _once(self._parts, self._noted)
        self._parts, self._noted, self._settled = [], 0, 0
        return found


def _once(parts: list[Ints], count: int) -> Ints:
    if not count:
        return np.empty(0, np.int64)
    end = 1 + max(int(part.max(initial=0)) for part in parts)
    if end > _DENSE * count:
        return np.unique(np.concatenate(parts))
    mask = np.zeros(end, np.bool_)
    for part in parts:
        mask[part] = True
    return np.flatnonzero(mask)
