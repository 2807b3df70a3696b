"""Histograms of what a version was trained on, for drift to compare with."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

BINS = 10
Numbers = npt.NDArray[np.floating[Any]]


def reference_histogram(column: str, values: Numbers, bins: int = BINS) -> dict[str, Any]:
    """The histogram of a column, in the shape of ModelVersionRegistered.reference.

    n rising inner edges make n+1 bins closed on the right (a value on an edge belongs below it),
    and NaN has a bin of its own at the end: n+2 counts. The edges lie on quantiles of the values;
    where few values are distinct, between each pair of neighbours; a constant has none.
    """
    numbers = values.astype(np.float64)
    finite = numbers[np.isfinite(numbers)]
    edges = inner_edges(finite, bins)
    places = np.searchsorted(edges, numbers, side="left")
    places[np.isnan(numbers)] = len(edges) + 1
    counts = np.bincount(places, minlength=len(edges) + 2)
    return {"column": column, "edges": edges.tolist(), "counts": counts.tolist()}


def inner_edges(finite: npt.NDArray[np.float64], bins: int) -> npt.NDArray[np.float64]:
    """At most `bins - 1` rising edges that each part the values."""
    distinct = np.unique(finite)
    if len(distinct) <= 1:
        return np.empty(0)
    if len(distinct) <= bins:
        return (distinct[:-1] + distinct[1:]) / 2
    quantiles = np.unique(np.quantile(finite, np.arange(1, bins) / bins))
    edges: npt.NDArray[np.float64] = quantiles[quantiles < distinct[-1]]
    return edges
