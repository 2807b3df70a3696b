"""Training sets of what was served: the vectors that predictions were made from, as they were.

Nothing is recomputed, so there is no skew; but there are only the features and the requests that a
model was asked with.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

import numpy as np
import polars as pl

from causemesh.errors import Misdeclared
from causemesh.lake.opening import away
from causemesh.lake.progress import progress_of
from causemesh.lake.reading import Lake, Selection
from services.features.offline.reading import TableRead, Told
from services.features.offline.sets import TrainingSet, made_now

PREDICTIONS = "inference.predictions.v1"
VERSIONS = "models.versions.v1"
REQUESTS = "inference.requests.v1"
_CARRIED = ("request_id", "tenant_id", "occurred_at", "model", "version", "score")


@dataclass(frozen=True)
class Logged:
    """Which predictions: of one version of a model, of some event time (None: of any)."""

    model: str
    version: int
    since: datetime | None = None
    until: datetime | None = None


def logged_training_set(
    lake: Lake, wanted: Logged, *, told: Told = lambda text: None
) -> TrainingSet:
    """One row a prediction: who asked when, the score, the request's entities and the vector.

    A feature is a float32 column of its own, an entity one `entity.<name>`. Failed, expired and
    shed requests are left out. Raises Misdeclared for a version that the lake knows nothing of.
    """
    tables: dict[str, TableRead] = {}
    features = _features(lake, wanted, tables)
    chosen = lake.select(
        PREDICTIONS,
        since=wanted.since,
        until=wanted.until,
        columns=[*_CARRIED, "outcome", "vector"],
    )
    mine = (
        (pl.col("model") == wanted.model)
        & (pl.col("version") == wanted.version)
        & (pl.col("outcome") == "predicted")
    )
    rows = _collected(lake, PREDICTIONS, chosen, mine, tables)
    told(f"{PREDICTIONS}: {rows.height:,} vectors of {wanted.model}@{wanted.version}")
    rows = rows.sort("occurred_at", "request_id")
    asked = lake.select(
        REQUESTS,
        since=wanted.since,
        until=wanted.until,
        columns=["event_id", "model", "entities"],
    )
    requests = _collected(lake, REQUESTS, asked, pl.col("model") == wanted.model, tables)
    frame = rows.select(_CARRIED).join(
        _entities(requests), on="request_id", how="left", maintain_order="left"
    )
    vectors = _matrix(rows["vector"], len(features))
    columns = [pl.Series(name, vectors[:, place]) for place, name in enumerate(features)]
    about = {
        "kind": "logged",
        "model": wanted.model,
        "version": wanted.version,
        "features": features,
    }
    return made_now(frame.hstack(columns), about, tables)


def _features(lake: Lake, wanted: Logged, tables: dict[str, TableRead]) -> list[str]:
    """The names of a version's features; a version never changes them."""
    chosen = lake.select(VERSIONS, columns=["model", "version", "features"])
    named = (pl.col("model") == wanted.model) & (pl.col("version") == wanted.version)
    found = _collected(lake, VERSIONS, chosen, named, tables)
    if not found.height:
        raise Misdeclared(f"the lake knows no {wanted.model}@{wanted.version}; see {VERSIONS}")
    names: list[str] = found["features"].to_list()[0]
    return names


def _collected(
    lake: Lake, topic: str, chosen: Selection, where: pl.Expr, tables: dict[str, TableRead]
) -> pl.DataFrame:
    with away():
        found = chosen.lazy().filter(where).collect()
    whole_us = progress_of(chosen.table.metadata).watermark_us()
    identifier = lake.definition.table(topic).identifier
    tables[identifier] = TableRead(topic, chosen.snapshot_id, found.height, whole_us)
    return found


def _entities(requests: pl.DataFrame) -> pl.DataFrame:
    """request_id, and one column an entity that any request names."""
    asked = requests.select(pl.col("event_id").alias("request_id"), "entities")
    pairs = asked.explode("entities").drop_nulls("entities").unnest("entities")
    names = pairs["name"].unique().sort().to_list()
    columns = [
        pl.col("value").filter(pl.col("name") == name).first().alias(f"entity.{name}")
        for name in names
    ]
    return pairs.group_by("request_id").agg(columns)


def _matrix(vectors: pl.Series, width: int) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """float32 [rows, width]. Raises Misdeclared when a vector is of another width."""
    sizes = vectors.bin.size().to_numpy()
    if (sizes != 4 * width).any():
        raise Misdeclared(
            f"a logged vector has {int(sizes.max())} bytes, not those of {width} features"
        )
    joined = b"".join(vectors.to_list())
    return np.frombuffer(joined, "<f4").reshape(len(vectors), width)
