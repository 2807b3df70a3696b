"""Histograms of a model's columns: the training reference, and the counts of what it sees now."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from causemesh.errors import Misdeclared, Poison

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.floating[Any]]
Matrix = npt.NDArray[np.float32]

SCORE = "score"
"""The column name of the model's own output, beside the names of its features."""

COUNTS = pl.Schema(
    {
        "model": pl.String,
        "version": pl.Int32,
        "day": pl.String,
        "column": pl.String,
        "bin": pl.Int32,
        "count": pl.Int64,
    }
)
"""The columns of `count_batch`."""

_DAY_US = 86_400_000_000
_FLOAT32_BYTES = 4


@dataclass(frozen=True, eq=False)
class Histogram:
    """Counts int64[n + 2] of the bins that the inner edges float64[n] make (see the package).

    Raises Misdeclared when edges are not finite and rising, or the counts do not fit them.
    """

    edges: Floats
    counts: Ints

    def __post_init__(self) -> None:
        if not (np.isfinite(self.edges).all() and (np.diff(self.edges) > 0).all()):
            raise Misdeclared("histogram edges must be finite and strictly rising")
        if len(self.counts) != len(self.edges) + 2 or (self.counts < 0).any():
            raise Misdeclared(
                f"{len(self.edges)} edges need {len(self.edges) + 2} counts of 0 or more "
                f"(the last is for NaN), not {self.counts.tolist()}"
            )


@dataclass(frozen=True)
class Signature:
    """What drift must know of one model version: its vector's columns and their references.

    A column without a reference has nothing to be compared with and is not counted. Raises
    Misdeclared for a reference of a column that is neither a feature nor the score.
    """

    model: str
    version: int
    features: tuple[str, ...]
    reference: Mapping[str, Histogram]

    def __post_init__(self) -> None:
        unknown = sorted(set(self.reference) - {*self.features, SCORE})
        if unknown or SCORE in self.features:
            raise Misdeclared(
                f"model {self.model!r} version {self.version}: a reference is for a feature or for "
                f"{SCORE!r}, and no feature is called {SCORE!r}; unknown: {unknown}"
            )

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Signature:
        """Read a ModelVersionRegistered record."""
        reference = {
            entry["column"]: Histogram(
                np.asarray(entry["edges"], np.float64), np.asarray(entry["counts"], np.int64)
            )
            for entry in record["reference"]
        }
        return cls(record["model"], record["version"], tuple(record["features"]), reference)


def bin_indexes(values: Floats, edges: Floats) -> Ints:
    """The bin of each value: 0 to n, and n + 1 for NaN."""
    indexes = np.searchsorted(edges, values, side="left").astype(np.int64, copy=False)
    return np.where(np.isnan(values), len(edges) + 1, indexes)


def bin_counts(values: Floats, edges: Floats) -> Ints:
    """How many values fall into each of the n + 2 bins."""
    return np.bincount(bin_indexes(values, edges), minlength=len(edges) + 2).astype(np.int64)


def reference_histogram(values: Floats, bins: int = 10) -> Histogram:
    """A histogram of at most `bins` bins of about equal counts, and the bin for NaN.

    The edges come from the finite values: after each k/bins quantile (the smallest value that so
    large a share does not exceed), or after every value when there are no more than `bins`
    distinct ones. A constant column gets no edges, so only NaN can be seen to drift in it.
    """
    if bins < 1:
        raise Misdeclared(f"a reference needs 1 bin or more, not {bins}")
    wide = np.asarray(values, np.float64)
    distinct, counts = np.unique(wide[np.isfinite(wide)], return_counts=True)
    edges = _edges_after(distinct, _cuts(counts, bins))
    return Histogram(edges, bin_counts(wide, edges))


def _cuts(counts: Ints, bins: int) -> Ints:
    """Places of the distinct values that an edge follows; integers, so no quantile is rounded."""
    if len(counts) <= bins:
        return np.arange(max(len(counts) - 1, 0))
    wanted = np.arange(1, bins) * counts.sum()
    places = np.unique(np.searchsorted(np.cumsum(counts) * bins, wanted, side="left"))
    return places[places < len(counts) - 1]


def _edges_after(distinct: Floats, cuts: Ints) -> Floats:
    """Edges half-way to the next value: the same bin in float32, in which vectors travel."""
    lower, upper = distinct[cuts], distinct[cuts + 1]
    middle = lower / 2 + upper / 2
    # between neighbouring floats there is no middle, and a right-closed bin ends on its own value
    return np.where((middle >= lower) & (middle < upper), middle, lower)


def vectors(column: pl.Series, width: int, rows: Ints | None = None) -> Matrix:
    """Little-endian float32 vectors as a matrix [len(column), width].

    Raises Poison for those of another length; `rows` are the rows to name (default: 0, 1, ...).
    """
    sizes = column.bin.size().fill_null(0).to_numpy()
    bad = np.flatnonzero(sizes != width * _FLOAT32_BYTES)
    if len(bad):
        named = bad if rows is None else rows[bad]
        raise Poison(
            {
                int(row): f"the vector has {size} bytes; {width} features need {width * 4}"
                for row, size in zip(named, sizes[bad], strict=True)
            }
        )
    joined = np.frombuffer(b"".join(column.to_list()), dtype="<f4")
    return joined.astype(np.float32, copy=False).reshape(len(column), width)


def count_batch(frame: pl.DataFrame, signature: Signature) -> pl.DataFrame:
    """Count the predictions of one model version in PredictionMade columns.

    Gives one row (see COUNTS) for each day, column and bin that is not empty, in that order, with
    columns in the signature's order and the score last; a missing score counts as NaN. Rows of
    other versions, and requests that were not predicted, are left out. Raises Poison, naming rows
    of `frame`, for vectors of another length than the signature's.
    """
    wanted = (
        (frame["model"] == signature.model)
        & (frame["version"] == signature.version)
        & (frame["outcome"] == "predicted")
    )
    rows = np.flatnonzero(wanted.to_numpy())
    chosen = frame[rows]
    matrix = vectors(chosen["vector"], len(signature.features), rows)
    columns: dict[str, Floats] = {name: matrix[:, i] for i, name in enumerate(signature.features)}
    columns[SCORE] = chosen["score"].fill_null(float("nan")).to_numpy()
    occurred_at_us = chosen["occurred_at"].dt.cast_time_unit("us").to_physical().to_numpy()
    counted = {name: values for name, values in columns.items() if name in signature.reference}
    return _count(counted, occurred_at_us // _DAY_US, signature)


def _count(columns: Mapping[str, Floats], days: Ints, signature: Signature) -> pl.DataFrame:
    distinct, place = np.unique(days, return_inverse=True)
    found = [np.empty((4, 0), np.int64)]
    for index, (name, values) in enumerate(columns.items()):
        edges = signature.reference[name].edges
        size = len(edges) + 2
        counts = np.bincount(place * size + bin_indexes(values, edges))
        used = np.flatnonzero(counts)
        found.append(np.stack([used // size, np.full_like(used, index), used % size, counts[used]]))
    table = np.concatenate(found, axis=1)
    day, column, bins, count = table[:, np.argsort(table[0], kind="stable")]
    names = pl.Series(distinct, dtype=pl.Int32).cast(pl.Date).dt.to_string("%Y-%m-%d")
    return pl.DataFrame(
        {
            "model": [signature.model] * len(day),
            "version": [signature.version] * len(day),
            "day": names.gather(day),
            "column": pl.Series(list(columns), dtype=pl.String).gather(column),
            "bin": bins,
            "count": count,
        },
        schema=COUNTS,
    )
