"""Served vectors held to what the batch engine makes of the lake."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from causemesh.errors import Misdeclared
from causemesh.lake.opening import away
from causemesh.lake.progress import progress_of
from causemesh.lake.reading import Lake
from services.features.domain.models import named_values
from services.features.domain.transforms import INPUT
from services.features.domain.vectors import Vectors
from services.features.offline.definitions import Definitions
from services.features.offline.logged import REQUESTS, VERSIONS
from services.features.offline.reading import LakeEvents, instant
from services.features.offline.training import Asking, vectors_of

SERVED = pl.Schema(
    {
        "position": pl.Int64,
        "request_id": pl.String,
        "tenant_id": pl.String,
        "occurred_us": pl.Int64,
        "model": pl.String,
        "version": pl.Int32,
        "vector": pl.Binary,
    }
)
"""A sample of predictions; `position` is the prediction's, on its partition."""
_NEVER_US = -(2**62)


@dataclass(frozen=True)
class Difference:
    """A served vector that is not what the lake gives.

    `row` has the columns of SERVED, mode and as_of_us; `features` maps a name to what was served
    and what was recomputed, NaN for missing.
    """

    row: Mapping[str, Any]
    features: Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class Checked:
    """How many of a sample, from its start on, are done with; of those how many were compared, and
    what differs. Not compared is what the project does not declare any more."""

    done: int = 0
    compared: int = 0
    differences: Sequence[Difference] = ()


class SkewCheck:
    """Compares samples in the order of their positions, as far as the lake has got."""

    def __init__(self, lake: Lake, definitions: Definitions, slice_us: int) -> None:
        self._lake = lake
        self._definitions = definitions
        self._slice_us = slice_us

    def check(self, served: pl.DataFrame) -> Checked:
        """Compare those of the sample (see SERVED) that come before the first one that the lake
        does not hold all events of yet. Raises Retryable while the lake is away."""
        asked = self._asked(served)
        ready = asked.head(self._ready(asked))
        differences: list[Difference] = []
        compared = 0
        for (model, version), rows in ready.group_by("model", "version"):
            names = self._features(str(model), int(str(version)))
            if names is not None:
                compared += rows.height
                differences += self._compare(rows, names)
        differences.sort(key=lambda one: int(one.row["position"]))
        return Checked(ready.height, compared, differences)

    def _asked(self, served: pl.DataFrame) -> pl.DataFrame:
        """With each its request's mode, entities and inputs, null while the lake has none, and the
        as-of time."""
        at_us = served["occurred_us"].to_numpy()
        chosen = self._lake.select(
            REQUESTS,
            since=instant(int(at_us.min())),
            until=instant(int(at_us.max()) + 1),
            columns=["event_id", "tenant_id", "mode", "entities", "inputs"],
        )
        mine = pl.col("event_id").is_in(served["request_id"].to_list())
        with away():
            found = chosen.lazy().filter(mine).collect()
        named = ["tenant_id", "request_id"]
        requests = found.rename({"event_id": "request_id"}).unique(named)
        time = pl.col("occurred_us")
        replayed = time // self._slice_us * self._slice_us
        as_of = pl.when(pl.col("mode") == "replay").then(replayed).otherwise(time + 1)
        joined = served.join(requests, on=named, how="left", maintain_order="left")
        return joined.with_columns(as_of.alias("as_of_us"))

    def _ready(self, asked: pl.DataFrame) -> int:
        """How many, from the first on, can be compared."""
        topics = {f"events.{view.event_type}" for view in self._definitions.views}
        whole_us = min(map(self._whole_us, sorted(topics)))
        waits = (asked["mode"].is_null() | (asked["as_of_us"] > whole_us)).to_numpy()
        return int(waits.argmax()) if waits.any() else asked.height

    def _whole_us(self, topic: str) -> int:
        """Before when the lake holds all of a topic."""
        whole_us = progress_of(self._lake.table(topic).metadata).watermark_us()
        return _NEVER_US if whole_us is None else whole_us

    def _features(self, model: str, version: int) -> list[str] | None:
        """The features of a version; None when the project does not declare them all."""
        chosen = self._lake.select(VERSIONS, columns=["model", "version", "features"])
        named = (pl.col("model") == model) & (pl.col("version") == version)
        with away():
            found = chosen.lazy().filter(named).collect()["features"].to_list()
        if not found:
            return None
        names: list[str] = found[0]
        try:
            self._definitions.expand([one for one in names if not one.startswith(INPUT)])
        except Misdeclared:
            return None
        return names

    def _compare(self, rows: pl.DataFrame, names: Sequence[str]) -> list[Difference]:
        joined = b"".join(rows["vector"].to_list())
        served = np.frombuffer(joined, "<f4").reshape(rows.height, len(names))
        again = self._again(rows, names)
        differs = (served != again) & ~(np.isnan(served) & np.isnan(again))
        differs &= np.array([not name.startswith(INPUT) for name in names])
        found = []
        for number in np.flatnonzero(differs.any(axis=1)).tolist():
            features = {
                names[place]: (float(served[number, place]), float(again[number, place]))
                for place in np.flatnonzero(differs[number]).tolist()
            }
            found.append(Difference(rows.row(number, named=True), features))
        return found

    def _again(self, rows: pl.DataFrame, names: Sequence[str]) -> Vectors:
        """The vectors as the batch engine makes them."""
        definitions, transforms = self._definitions, self._definitions.transforms
        sources = transforms.sources(names)
        entities = sorted({one for view in definitions.views for one in view.request_entity})
        inputs = [one.removeprefix(INPUT) for one in sources if one.startswith(INPUT)]
        given = named_values(rows["inputs"], inputs, pl.Float64).get_columns()
        columns = [
            rows["tenant_id"],
            *named_values(rows["entities"], entities, pl.String).get_columns(),
            *(one.alias(INPUT + one.name) for one in given),
        ]
        asking = Asking(pl.DataFrame(columns), rows["as_of_us"].to_numpy(), sources)
        events = LakeEvents(self._lake, definitions.catalogue)
        found = vectors_of(asking, events, definitions)
        return transforms.compute(names, sources, found) if transforms.digest(names) else found
