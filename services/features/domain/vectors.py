"""From primitives to the numbers of a vector, always by the same float operations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from services.features.domain.aggregates import NEVER, NO_MINIMUM, Aggregates
from services.features.domain.cells import Cells
from services.features.domain.definitions import FeatureView
from services.features.domain.events import Ints
from services.features.domain.layout import SQUARE_BITS, Group, Layout
from services.features.domain.sketched import SketchAnswers
from services.features.domain.sketches import distinct, quantile, share, top
from services.features.domain.windowed import decayed_total

Vectors = npt.NDArray[np.float32]
Floats = npt.NDArray[np.floating[Any]]  # float64: what the type checker makes of int * float
# Above this a sum of squared deviations may have left int64; floats are exact enough there.
_INT_LIMIT = 2.0**62
# With less than this in the upper half of a sum of squares, no sum of deviations comes near that.
_HIGH_LIMIT = 2**29


def row_bytes(matrix: npt.NDArray[Any], kind: str = "<f4") -> list[bytes]:
    """Each row as bytes of numbers of `kind`: float32 little-endian, unless said otherwise."""
    rows, width = matrix.shape
    if not width:
        return [b""] * rows
    whole = np.ascontiguousarray(matrix, kind)
    packed = whole.view(np.dtype((np.void, whole.itemsize * width)))
    return cast("list[bytes]", packed.ravel().tolist())


@dataclass(frozen=True)
class Primitives:
    """All that an answer is made from.

    windows: aggregates of shape [n, windows]; decayed: int64 [n, decays, 3]; latest: records [n,
    latests, RECORD]; as_of_us: [n]; sketches: None where the view has none.
    """

    windows: Aggregates
    decayed: Ints
    latest: Ints
    as_of_us: Ints
    sketches: SketchAnswers | None = None

    # Below, requests come last: what a feature needs of all of them then lies in one piece.
    @cached_property
    def sums(self) -> Ints:
        """Sums by part and window: int64 [sums, windows, n]."""
        return np.ascontiguousarray(self.windows.sums.T)

    @cached_property
    def mins(self) -> Ints:
        """Minima by part and window: int64 [mins, windows, n]."""
        return np.ascontiguousarray(self.windows.mins.T)

    @cached_property
    def lasts(self) -> Ints:
        """Times and values of records by part and window: int64 [2, lasts, windows, n]."""
        return np.ascontiguousarray(self.windows.lasts[..., ::3].T)


def vectors(view: FeatureView, layout: Layout, primitives: Primitives) -> Vectors:
    """The view's features for each request: float32 [n, features], NaN where there is nothing."""
    out = np.empty((len(view.features), len(primitives.as_of_us)), np.float32)
    for group in layout.groups:
        finish = _FINISH[group.aggregation]
        numbers = finish(view, group, primitives)
        if group.divisor is not None:
            divisor = finish(view, group.divisor, primitives)
            numbers = _unless(divisor == 0, numbers / np.where(divisor == 0, 1.0, divisor))
        out[group.target] = numbers
    return out.T


# Each gives the numbers of a group's features: [features of the group, n].


def _sums(group: Group, primitives: Primitives) -> list[Ints]:
    return [primitives.sums[at] for at in group.sources]


def _count(_view: FeatureView, group: Group, primitives: Primitives) -> Floats:
    return _sums(group, primitives)[0].astype(np.float64)


def _sum(view: FeatureView, group: Group, primitives: Primitives) -> Floats:
    return _sums(group, primitives)[0] * view.resolution


def _mean(view: FeatureView, group: Group, primitives: Primitives) -> Floats:
    count, total = _sums(group, primitives)
    return _unless(count == 0, total / np.maximum(count, 1) * view.resolution)


def _std(view: FeatureView, group: Group, primitives: Primitives) -> Floats:
    """Population deviation about the mean, computed about the nearest whole number to it.

    With c = round(mean), sum((q - c)^2) = S2 - 2cS1 + nc^2 has no cancellation left to lose: it
    is exact in int64 (modulo 2^64) while it fits, and so large that floats do where it does not.
    """
    count, total, high, low = _sums(group, primitives)
    n = np.maximum(count, 1)
    center = np.rint(total / n).astype(np.int64)
    exact = (high << SQUARE_BITS) + low - 2 * center * total + n * center * center
    deviations = exact.astype(np.float64)
    if high.max(initial=0) >= _HIGH_LIMIT:
        c, s1 = center.astype(np.float64), total.astype(np.float64)
        squares = high.astype(np.float64) * 2.0**SQUARE_BITS + low
        rough = squares - 2.0 * c * s1 + n * c * c
        deviations = np.where(rough < _INT_LIMIT, deviations, rough)
    offset = (total - n * center) / n
    variance = np.maximum(deviations / n - offset * offset, 0.0)
    return _unless(count == 0, np.sqrt(variance) * view.resolution)


def _extreme(sign: int) -> Callable[[FeatureView, Group, Primitives], Floats]:
    def finish(view: FeatureView, group: Group, primitives: Primitives) -> Floats:
        found = primitives.mins[group.sources[0]]
        return _unless(found == NO_MINIMUM, sign * found * view.resolution)

    return finish


def _last(view: FeatureView, group: Group, primitives: Primitives) -> Floats:
    times, values = primitives.lasts
    at = group.sources[0]
    return _unless(times[at] == NEVER, values[at] * view.resolution)


def _ewma(view: FeatureView, group: Group, primitives: Primitives) -> Floats:
    """sum(w q) / sum(w), w = 2**(-age / half-life) at the grain of tiles: forward decay.

    Cormode, Shkapenyuk, Srivastava and Xu, "Forward Decay: A Practical Time Decay Model for
    Streaming Systems" (2009): a weight depends on the event's age alone, so sums merge. The weights
    are whole (see `decay_weights`), so the weighted sums are exact.
    """
    found = primitives.decayed[:, group.own]
    weight = found[..., 0]
    mean = decayed_total(found) / np.maximum(weight, 1)
    return _unless(weight == 0, mean * view.resolution).T


def _sketched(view: FeatureView, group: Group, primitives: Primitives) -> Floats:
    out = np.empty((len(group.spans), len(primitives.as_of_us)))
    finish = _SKETCHED[group.aggregation]
    scale = view.resolution if group.aggregation in ("quantile", "top") else 1.0
    asked = zip(group.parts[0].tolist(), group.spans.tolist(), group.parameters, strict=True)
    for row, (sketch, window, parameter) in zip(out, asked, strict=True):
        assert primitives.sketches is not None
        cells = primitives.sketches.cells(sketch, window)
        row[:] = finish(cells, parameter, len(row)) * scale
    return out


def _latest(view: FeatureView, group: Group, primitives: Primitives) -> Floats:
    found = primitives.latest.T[:, group.own]
    return _unless(_gone(view, found, primitives), found[3] * view.resolution)


def _age(view: FeatureView, group: Group, primitives: Primitives) -> Floats:
    found = primitives.latest.T[:, group.own]
    age_us = np.maximum(primitives.as_of_us - found[0], 0)
    return _unless(_gone(view, found, primitives), age_us / 1e6)


def _gone(view: FeatureView, found: Ints, primitives: Primitives) -> npt.NDArray[np.bool_]:
    """Where there is no record, or only one that is older than the view remembers."""
    absent = found[0] == NEVER
    if view.retention_us is None:
        return np.asarray(absent)
    oldest = primitives.as_of_us - view.retention_us
    return np.asarray(absent | (found[0] < oldest))


def _unless(empty: npt.NDArray[np.bool_], values: Floats) -> Floats:
    # one NaN, the same bits on every machine
    return np.where(empty, np.nan, values)


_FINISH: dict[str, Callable[[FeatureView, Group, Primitives], Floats]] = {
    "count": _count,
    "sum": _sum,
    "mean": _mean,
    "std": _std,
    "min": _extreme(1),
    "max": _extreme(-1),
    "first": _last,
    "last": _last,
    "ewma": _ewma,
    "distinct": _sketched,
    "quantile": _sketched,
    "top": _sketched,
    "share": _sketched,
    "latest": _latest,
    "age": _age,
}
_SKETCHED: dict[str, Callable[[Cells, float, int], Floats]] = {
    "distinct": lambda found, _, n: distinct(found.owners, found.values, n),
    "quantile": lambda found, q, n: quantile(found.owners, found.cells, found.values, q, n),
    "top": lambda found, k, n: top(found.owners, found.cells, found.values, int(k), n),
    "share": lambda found, k, n: share(found.owners, found.cells, found.values, int(k), n),
}
