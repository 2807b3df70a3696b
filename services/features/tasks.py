"""Tasks for the lanes: requests that were answered, with the vector that the version asks for."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

from causemesh.runner import Outgoing
from services.features.domain.models import UNRESOLVED, ModelBook, full_vectors
from services.features.plan import REQUESTS, tasks_topic

_INSTANTS = {
    "occurred_at": "occurred_at_us",
    "features_as_of": "as_of_us",
    "expires_at": "expires_us",
}


def tasks_of(ready: pl.DataFrame, book: ModelBook, partition: int) -> list[Outgoing]:
    """The tasks of answered requests (see `Aligner.ready`) of a partition, by lane."""
    lane_of = {name: one.lane for name, one in book.signatures.items()}
    lanes = pl.Series([lane_of.get(name, "realtime") for name in ready["signature"].to_list()])
    names = sorted(set(lanes))
    if len(names) == 1:
        return [_lane_tasks(names[0], ready, book, partition)]
    return [_lane_tasks(lane, ready.filter(lanes == lane), book, partition) for lane in names]


def _lane_tasks(lane: str, ready: pl.DataFrame, book: ModelBook, partition: int) -> Outgoing:
    vectors = np.full(ready.height, b"", dtype=object)
    failures = np.array(ready["failure"].to_list(), dtype=object)
    for name in sorted(set(ready["signature"].to_list()) - {UNRESOLVED}):
        at = np.flatnonzero((ready["signature"] == name).to_numpy())
        part = ready if len(at) == ready.height else ready[at]
        vectors[at], missing = _completed(book, name, part)
        failures[at] = missing
    instants = {
        name: ready[of].cast(pl.Datetime("us", "UTC")).alias(name) for name, of in _INSTANTS.items()
    }
    frame = pl.DataFrame(
        [
            ready["tenant_id"],
            instants["occurred_at"],
            ready["request_id"],
            ready["model"],
            ready["version"],
            pl.Series("vector", vectors.tolist(), dtype=pl.Binary),
            instants["features_as_of"],
            pl.Series("failure", failures.tolist(), dtype=pl.String),
            instants["expires_at"],
        ]
    )
    positions = ready["position"].to_numpy()
    return Outgoing(
        tasks_topic(lane), frame, ready["key"].to_list(), REQUESTS, partition, positions
    )


def _completed(
    book: ModelBook, name: str, part: pl.DataFrame
) -> tuple[np.ndarray[Any, Any], list[str | None]]:
    views, inputs = part["vector"].to_list(), part["inputs"].to_list()
    vectors, missing = full_vectors(book.signatures[name], views, inputs, book.transforms)
    whole = np.empty(len(vectors), dtype=object)
    whole[:] = vectors
    return whole, missing
