"""Which ages and times each window of each request covers, and what was found in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from services.features.domain.aggregates import Aggregates
from services.features.domain.events import Ints
from services.features.domain.layout import Layout

_LIMB_BITS = 32
_LIMB = (1 << _LIMB_BITS) - 1


@dataclass(frozen=True)
class Extents:
    """Of `n` requests: newest_tile [n], tile_us, as_of_us [n], and by window ages [low, high).

    low, high: int64 [n, windows]; a sliding window covers [0, span) whatever the request.
    """

    newest_tile: Ints
    tile_us: int
    as_of_us: Ints
    low: Ints
    high: Ints

    @property
    def first_us(self) -> Ints:
        """The first instant of each window: [n, windows]."""
        return np.asarray((self.newest_tile[:, None] - self.high + 1) * self.tile_us)

    @property
    def end_us(self) -> Ints:
        """The first instant after each window: [n, windows]; the as-of time if it is open."""
        end = (self.newest_tile[:, None] - self.low + 1) * self.tile_us
        return np.asarray(np.minimum(end, self.as_of_us[:, None]))

    def block(self, chosen: slice) -> Extents:
        """The same of some requests."""
        return Extents(
            self.newest_tile[chosen],
            self.tile_us,
            self.as_of_us[chosen],
            self.low[chosen],
            self.high[chosen],
        )


def extents_of(layout: Layout, tile_us: int, as_of_us: Ints) -> Extents:
    """The extents of all windows whose place depends on time alone; sessions are open to fill."""
    newest_tile = (as_of_us - 1) // tile_us
    shape = (len(as_of_us), len(layout.windows))
    low, high = np.zeros(shape, np.int64), np.empty(shape, np.int64)
    high[:] = layout.spans
    for place, window in enumerate(layout.windows):
        if window.shape == "tumbling":
            end = as_of_us // window.length_us * window.length_us
            low[:, place] = newest_tile - end // tile_us + 1
            high[:, place] += low[:, place]
    return Extents(newest_tile, tile_us, as_of_us, low, high)


def session_ages(first_us: Ints, last_us: Ints, as_of_us: Ints, gap_us: int) -> Ints:
    """How many of the newest tiles hold the open session: [n].

    first_us, last_us: the first and last event of each tile by age, [n, ages]; where a tile is
    empty the first is the highest int64, the last the lowest.
    """
    following = np.concatenate([as_of_us[:, None], first_us[:, :-1]], axis=1)
    following = np.minimum.accumulate(following, axis=1)
    used = first_us <= last_us
    # an empty tile would overflow; it breaks nothing
    breaks = used & (following - np.where(used, last_us, following) > gap_us)
    return np.asarray(np.where(breaks.any(axis=1), breaks.argmax(axis=1), first_us.shape[1]))


def decayed(layout: Layout, sums: Ints) -> Ints:
    """Weighted sums over tiles by age: int64 [n, decays, 3] from sums [n, ages, sums].

    The three are the weight of the values, and their weighted total in two limbs: the sum of
    either limb cannot leave int64, and what they add up to is exact, whatever the grouping.
    """
    out = np.empty((len(sums), len(layout.decays), 3), np.int64)
    for place, decay in enumerate(layout.decays):
        weights = decay.weights
        total = sums[:, : len(weights), decay.total]
        out[:, place, 0] = sums[:, : len(weights), decay.count] @ weights
        out[:, place, 1] = (total >> _LIMB_BITS) @ weights
        out[:, place, 2] = (total & _LIMB) @ weights
    return out


def decayed_total(found: Ints) -> npt.NDArray[np.float64]:
    """The weighted total of `decayed` as floats: the same for any two limbs of the same number."""
    high = found[..., 1] + (found[..., 2] >> _LIMB_BITS)
    return np.asarray(high * 2.0**_LIMB_BITS + (found[..., 2] & _LIMB))


@dataclass(frozen=True)
class Windowed:
    """What requests found in their windows: aggregates [n, windows] and decayed [n, decays, 3]."""

    aggregates: Aggregates
    decayed: Ints

    def merge(self, other: Windowed) -> Windowed:
        """Over the events of both."""
        return Windowed(
            self.aggregates.merge(other.aggregates), np.asarray(self.decayed + other.decayed)
        )

    @staticmethod
    def concatenate(parts: Sequence[Windowed]) -> Windowed:
        """The same of all requests of all parts (at least one)."""
        found = [part.aggregates for part in parts]
        return Windowed(
            Aggregates(
                np.concatenate([one.sums for one in found]),
                np.concatenate([one.mins for one in found]),
                np.concatenate([one.lasts for one in found]),
            ),
            np.concatenate([part.decayed for part in parts]),
        )
