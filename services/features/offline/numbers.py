"""From spans to numbers: every aggregation but sketches, by the definitions of the views."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from services.features.domain.definitions import Feature
from services.features.domain.events import Ints
from services.features.domain.windows import decay_weights
from services.features.offline.history import NOTHING, History
from services.features.offline.spans import Asked, Span, blocks, expanded, newest_tile

Floats = npt.NDArray[np.float64]
_HALF_BITS = 31  # a square is summed in two halves
_LIMB_BITS = 32
_LIMB = (1 << _LIMB_BITS) - 1
# Above this a sum of squared deviations may have left int64; floats are exact enough there.
_INT_LIMIT = 2.0**62
_TOGETHER = 2**21  # so many tiles are weighted at once


def number_of(history: History, asked: Asked, feature: Feature, span: Span) -> Floats:
    """One number a request, NaN where there is none; `span` is that of the feature's window."""
    if feature.aggregation == "ewma":
        return _ewma(history, asked, feature, span)
    return _WINDOWED[feature.aggregation](history, feature.column, span)


def newest_of(history: History, asked: Asked, feature: Feature) -> Floats:
    """`latest` or `age`: of the newest event that has the input, whatever its age."""
    view = history.view
    if not len(history):
        return np.full(len(asked), np.nan)
    count = history.events.before(asked.entity, asked.as_of_us)
    at = np.where(count > 0, history.newest(feature.column)[count - 1], -1)
    found = (at >= 0) & (history.entity[at] == asked.entity)
    age_us = asked.as_of_us - history.at_us[at]
    if view.retention_us is not None:
        found &= age_us <= view.retention_us
    if feature.aggregation == "age":
        return np.where(found, age_us / 1e6, np.nan)
    assert feature.column is not None
    return np.where(found, history.units(feature.column)[at] * view.resolution, np.nan)


def _count(history: History, column: str | None, span: Span) -> Floats:
    counts = history.counts(column)
    return (counts[span.high] - counts[span.low]).astype(np.float64)


def _sum(history: History, column: str | None, span: Span) -> Floats:
    return np.asarray(_within(history.sums(_named(column)), span) * history.view.resolution)


def _mean(history: History, column: str | None, span: Span) -> Floats:
    count = _within(history.counts(column), span)
    total = _within(history.sums(_named(column)), span)
    return np.where(count == 0, np.nan, total / np.maximum(count, 1) * history.view.resolution)


def _std(history: History, column: str | None, span: Span) -> Floats:
    """Population deviation about the nearest whole number c to the mean.

    sum((q - c)^2) = S2 - 2cS1 + nc^2 is exact modulo 2^64 while it fits into int64.
    """
    name = _named(column)
    count = _within(history.counts(name), span)
    total = _within(history.sums(name), span)
    high = _within(history.squares(name, _HALF_BITS, -1), span)
    low = _within(history.squares(name, 0, (1 << _HALF_BITS) - 1), span)
    n = np.maximum(count, 1)
    center = np.rint(total / n).astype(np.int64)
    exact = (high << _HALF_BITS) + low - 2 * center * total + n * center * center
    c = center.astype(np.float64)
    squares = high.astype(np.float64) * 2.0**_HALF_BITS + low
    rough = squares - 2.0 * c * total.astype(np.float64) + n * c * c
    deviations = np.where(rough < _INT_LIMIT, exact.astype(np.float64), rough)
    offset = (total - n * center) / n
    variance = np.maximum(deviations / n - offset * offset, 0.0)
    return np.where(count == 0, np.nan, np.sqrt(variance) * history.view.resolution)


def _extreme(sign: int) -> Callable[[History, str | None, Span], Floats]:
    def finish(history: History, column: str | None, span: Span) -> Floats:
        least = _least(history, _named(column), sign, span)
        return np.where(least == NOTHING, np.nan, sign * least * history.view.resolution)

    return finish


def _least(history: History, column: str, sign: int, span: Span) -> Ints:
    """The least over whole tiles, and over the events of the tile that is cut."""
    out = np.full(len(span.low), NOTHING, np.int64)
    some = span.first < span.whole
    if some.any():
        # one tile behind the last, so that every range has an end to name
        ends = np.stack([span.first[some], span.whole[some]], axis=1).ravel()
        out[some] = np.minimum.reduceat(history.least(column, sign), ends)[::2]
    cut = np.flatnonzero(span.part < span.high)
    newest = history.least_so_far(column, sign)[span.high[cut] - 1]
    out[cut] = np.minimum(out[cut], newest)
    return out


def _last(history: History, column: str | None, span: Span) -> Floats:
    if not len(history):
        return np.full(len(span.low), np.nan)
    at = history.newest(column)[span.high - 1]
    found = (span.low < span.high) & (at >= span.low)
    return _value_at(history, column, found, at)


def _first(history: History, column: str | None, span: Span) -> Floats:
    if not len(history):
        return np.full(len(span.low), np.nan)
    at = history.oldest(column)[np.minimum(span.low, len(history) - 1)]
    found = (span.low < span.high) & (at < span.high)
    return _value_at(history, column, found, at)


def _value_at(
    history: History, column: str | None, found: npt.NDArray[np.bool_], at: Ints
) -> Floats:
    units = history.units(_named(column))[np.where(found, at, 0)]
    return np.where(found, units * history.view.resolution, np.nan)


def _ewma(history: History, asked: Asked, feature: Feature, span: Span) -> Floats:
    """sum(w q) / sum(w) with the whole weights of the tiles' ages: both sums are exact."""
    column = _named(feature.column)
    assert feature.window is not None
    weights = np.array(decay_weights(feature.window, history.view.tile_us), np.int64)
    counts, sums = history.counts(column), history.sums(column)
    out = np.empty(len(asked))
    for block in blocks(span.whole - span.first + 1, _TOGETHER):
        mine = asked.take(np.arange(block.start, block.stop))
        weight, high, low = _weighted(history, mine, span.block(block), weights, (counts, sums))
        high = high + (low >> _LIMB_BITS)
        total = high * 2.0**_LIMB_BITS + (low & _LIMB)
        mean = total / np.maximum(weight, 1)
        out[block] = np.where(weight == 0, np.nan, mean * history.view.resolution)
    return out


def _weighted(
    history: History, asked: Asked, span: Span, weights: Ints, running: tuple[Ints, Ints]
) -> tuple[Ints, Ints, Ints]:
    """The weight of the values, and their weighted total in two limbs."""
    counts, sums = running
    owners, tiles = expanded(span.first, span.whole)
    starts, ends = history.tile_starts[tiles], history.tile_starts[tiles + 1]
    number = history.at_us[starts] // history.view.tile_us
    age = newest_tile(history.view, asked)[owners] - number
    # the tile that is cut has age 0
    whose = np.concatenate((owners, np.arange(len(asked))))
    w = weights[np.concatenate((age, np.zeros(len(asked), np.int64)))]
    low = np.concatenate((starts, span.part))
    high = np.concatenate((ends, span.high))
    count, total = counts[high] - counts[low], sums[high] - sums[low]
    parts = (w * count, w * (total >> _LIMB_BITS), w * (total & _LIMB))
    found = []
    for part in parts:
        out = np.zeros(len(asked), np.int64)
        np.add.at(out, whose, part)
        found.append(out)
    return found[0], found[1], found[2]


def _within(running: Ints, span: Span) -> Ints:
    return running[span.high] - running[span.low]


def _named(column: str | None) -> str:
    assert column is not None  # a view is refused where an aggregation lacks its column
    return column


_WINDOWED: dict[str, Callable[[History, str | None, Span], Floats]] = {
    "count": _count,
    "sum": _sum,
    "mean": _mean,
    "std": _std,
    "min": _extreme(1),
    "max": _extreme(-1),
    "first": _first,
    "last": _last,
}
