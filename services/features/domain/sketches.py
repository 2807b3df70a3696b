"""Sketches whose cells are kept sparsely: what an event adds, and what a window's cells say.

A sketch is a map from cells to whole numbers that merges by maximum or by sum, so any grouping of
the same events gives the same cells. Only cells that were hit are kept (see `cells.py`).

registers  of `distinct`: HyperLogLog (Flajolet, Fusy, Gandouet, Meunier 2007), 2**10 registers, so
           a standard error of 1.04 / sqrt(1024) = 3.25%; a cell is a register, merged by maximum.
           Estimated without bias at any size as in Ertl, "New cardinality estimation algorithms for
           HyperLogLog sketches" (2017), algorithm 6.
buckets    of quantiles: DDSketch (Masson, Rim and Lee 2019) over exact integers. Its mapping is
           log-linear, as in HdrHistogram: 64 buckets an octave, of width 1 below 128 grid units.
           A quantile is the middle of the bucket that holds the value of rank floor(q * (n - 1)):
           within 1/128 of that value, exact below 128 units. No bucket is ever collapsed, so the
           bound holds for every quantile; there are at most 2 * 64 * 36 buckets.
values     of `top` and `share`: exact counts. A tile of an entity with more than MAX_VALUES
           different values is *crowded*, for good: windows that hold it answer NaN. (A summary that
           goes on with some of the values would depend on the order of arrival.)
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from services.features.domain.events import NULL, Ints

SketchKind = Literal["registers", "buckets", "values"]
REGISTER_BITS = 10
MAX_VALUES = 1024
CROWDED = NULL  # a cell that stands for all values of a crowded tile
_REGISTERS = 1 << REGISTER_BITS
_RANKS = 64 - REGISTER_BITS + 1  # the highest rank of a register
_LINEAR_BITS = 6
Floats = npt.NDArray[np.float64]
Unsigned = npt.NDArray[np.uint64]


def cells_of(kind: SketchKind, units: Ints) -> tuple[Ints, Ints]:
    """The cell of each value (grid units, none NULL) and what it brings to it."""
    if kind == "registers":
        mixed = _mixed(units)
        rest = mixed << np.uint64(REGISTER_BITS)
        return (mixed >> np.uint64(64 - REGISTER_BITS)).astype(np.int64), _leading_zeros(rest) + 1
    cells = bucket_of(units) if kind == "buckets" else units
    return cells, np.ones(len(units), np.int64)


def bucket_of(units: Ints) -> Ints:
    """The bucket of each value; buckets rise with the values."""
    size = np.abs(units)
    # the width of a bucket is a power of two: exact up to 2**53, far above any grid value
    octave = np.maximum(np.frexp(size.astype(np.float64))[1] - 1 - _LINEAR_BITS, 0)
    bucket = (octave << _LINEAR_BITS) + (size >> octave)
    return np.asarray(np.where(units < 0, -bucket, bucket))


def bucket_middle(buckets: Ints) -> Floats:
    """The middle of each bucket, in grid units."""
    size = np.abs(buckets)
    octave = np.maximum((size >> _LINEAR_BITS) - 1, 0)
    low = (size - (octave << _LINEAR_BITS)) << octave
    middle = low + ((1 << octave) - 1) / 2
    return np.asarray(np.where(buckets < 0, -middle, middle))


def _mixed(units: Ints) -> Unsigned:
    """64 well mixed bits of each value: the finaliser of splitmix64 (Steele, Lea, Flood 2014)."""
    bits = units.view(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(bits ^ (bits >> np.uint64(31)))


def _leading_zeros(bits: Unsigned) -> Ints:
    """Of the 64 - REGISTER_BITS bits at the top."""
    # in two halves: a float64 holds 32 bits exactly
    high = (bits >> np.uint64(32)).astype(np.float64)
    low = (bits & np.uint64(0xFFFFFFFF)).astype(np.float64)
    zeros = np.where(high > 0, 32 - np.frexp(high)[1], 64 - np.frexp(low)[1])
    return np.minimum(zeros, 64 - REGISTER_BITS).astype(np.int64)


def distinct(owners: Ints, ranks: Ints, count: int) -> Floats:
    """Estimates of `count` sketches from their registers; owners: which sketch, rising."""
    width = _RANKS + 1
    histogram = np.bincount(owners * width + ranks, minlength=count * width)
    histogram = histogram.reshape(count, width).astype(np.float64)
    histogram[:, 0] = _REGISTERS - histogram[:, 1:].sum(axis=1)
    z = _REGISTERS * _tau((_REGISTERS - histogram[:, _RANKS]) / _REGISTERS)
    for rank in range(_RANKS - 1, 0, -1):
        z = 0.5 * (z + histogram[:, rank])
    z += _REGISTERS * _sigma(histogram[:, 0] / _REGISTERS)
    return np.asarray(_REGISTERS * _REGISTERS / z / (2 * np.log(2)))


def _sigma(x: Floats) -> Floats:
    """x + sum x**(2**k) 2**(k - 1); infinite at 1, where no register was hit."""
    full = x >= 1.0
    x = np.where(full, 0.0, x)
    y, z = 1.0, x
    for _ in range(64):
        x = x * x
        following = z + x * y
        y += y
        if np.array_equal(following, z):
            break
        z = following
    return np.asarray(np.where(full, np.inf, z))


def _tau(x: Floats) -> Floats:
    """(1 - x - sum (1 - x**(2**-k))**2 2**-k) / 3."""
    edge = (x <= 0.0) | (x >= 1.0)
    x = np.where(edge, 0.5, x)
    y, z = 1.0, 1 - x
    for _ in range(64):
        x = np.sqrt(x)
        y *= 0.5
        following = z - (1 - x) ** 2 * y
        if np.array_equal(following, z):
            break
        z = following
    return np.asarray(np.where(edge, 0.0, z / 3))


def quantile(owners: Ints, buckets: Ints, counts: Ints, q: float, count: int) -> Floats:
    """The q-quantile of each sketch in grid units, NaN where it is empty; cells rise by owner."""
    out = np.full(count, np.nan)
    if not len(owners):
        return out
    running = np.cumsum(counts)
    here, starts = np.unique(owners, return_index=True)
    before = np.where(starts > 0, running[starts - 1], 0)
    totals = np.append(running[starts[1:] - 1], running[-1]) - before
    ranks = np.floor(q * (totals - 1)).astype(np.int64)
    out[here] = bucket_middle(buckets[np.searchsorted(running, before + ranks, side="right")])
    return out


def top(owners: Ints, values: Ints, counts: Ints, k: int, count: int) -> Floats:
    """The k-th most frequent value in grid units (of equals the least), NaN if there is none."""
    out = np.full(count, np.nan)
    order = np.lexsort((values, -counts, owners))
    starts = np.searchsorted(owners, np.arange(count))
    ends = np.searchsorted(owners, np.arange(count), side="right")
    found = np.flatnonzero(starts + k <= ends)
    out[found] = values[order[starts[found] + k - 1]]
    crowded = owners[values == CROWDED]
    out[crowded] = np.nan
    return out


def share(owners: Ints, values: Ints, counts: Ints, k: int, count: int) -> Floats:
    """What part of all values the k most frequent ones are; NaN if there is none."""
    order = np.lexsort((values, -counts, owners))
    running = np.concatenate(([0], np.cumsum(counts[order])))
    starts = np.searchsorted(owners, np.arange(count))
    ends = np.searchsorted(owners, np.arange(count), side="right")
    part = running[np.minimum(starts + k, ends)] - running[starts]
    total = running[ends] - running[starts]
    out = np.where(total > 0, part / np.maximum(total, 1), np.nan)
    out[owners[values == CROWDED]] = np.nan
    return np.asarray(out)
