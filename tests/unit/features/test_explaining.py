"""An explanation is the vector that was served, whatever came late."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import polars as pl
import pytest

from causemesh.codec.columns import frame_schema
from causemesh.log import LogReader
from causemesh.runner import Batch, Outgoing
from services.features.explaining import Asked, Explainer
from services.features.lateness import LATE
from services.features.plan import REQUESTS
from tests.unit.features.test_handlers import (
    CATALOGUE,
    EVENTS,
    FEATURES,
    MS,
    VIEWS,
    batch,
    join,
    registrations,
)

# A view that is fed by another topic here is not served with its events.
SERVED = [name for name in FEATURES if not name.startswith("moved")]
ENTITIES: Mapping[str, str | None] = {"sensor": "a", "site": "n"}


class Log:
    """What lies in the log, as `LogReader` gives it."""

    def __init__(self, parts: Mapping[str, Sequence[Batch]]) -> None:
        self._parts = parts

    async def ends(self, topics: Sequence[str]) -> Any:
        return topics

    async def read(self, topics: Any) -> AsyncIterator[Batch]:
        for topic in topics:
            for part in self._parts.get(topic, ()):
                yield part


def logged(part: Outgoing) -> Batch:
    """The records of an output, as they are read."""
    schema = frame_schema(CATALOGUE.topic(part.topic).record)
    causes = [
        {
            "topic": part.cause_topic,
            "partition": part.cause_partition,
            "position": at,
            "index": index,
        }
        for at, index in zip(part.positions.tolist(), cast(Any, part.indexes).tolist(), strict=True)
    ]
    frame = part.frame.with_columns(pl.Series("cause", causes, dtype=schema["cause"]))
    return Batch(part.topic, 0, frame, np.arange(len(part)), cast(Any, None))


def asked_at(*instants: int) -> Batch:
    entities = [{"name": name, "value": value} for name, value in ENTITIES.items()]
    row = {"model": "m", "version": 1, "mode": "replay", "entities": entities, "inputs": []}
    return batch((REQUESTS, 0), [{**row, "occurred_at": at * MS} for at in instants], 0)


def readings(start: int, *instants: int) -> Batch:
    rows = [
        {"occurred_at": at * MS, "sensor": "a", "site": "n", "value": float(at)} for at in instants
    ]
    return batch((EVENTS, 0), rows, start)


@pytest.mark.parametrize("known", [True, False])
async def test_it_counts_what_came_late_as_the_stream_did(known: bool) -> None:
    """One reading of 95 ms is taken late, one of 30 ms is missed by the view of windows alone;
    requests before, between and after. Control: without the records of that they differ."""
    processor = join()
    await processor.process([registrations(), readings(0, 20, 35, 60, 92, 104)], 0, None)
    units = [await processor.process([asked_at(60, 97, 104, 118, 135)], 100 * MS, None)]
    late = readings(5, 95, 30)
    units.append(await processor.process([late], 110 * MS, None))
    units.append(await processor.process([], 140 * MS, None))
    outgoing = [part for unit in units for part in unit.outgoing]
    records = [logged(part) for part in outgoing if part.topic == LATE]
    assert sum(map(len, records)) == 4
    tasks = pl.concat(
        part.frame for part in outgoing if part.topic.startswith("inference.tasks.")
    ).sort("occurred_at")
    assert tasks.height == 5
    log = Log({EVENTS: [readings(0, 20, 35, 60, 92, 104), late], LATE: records if known else []})
    explainer = Explainer(cast(LogReader, log), VIEWS)
    equal = []
    for as_of, vector in tasks.select("features_as_of", "vector").rows():
        as_of_us = round(as_of.timestamp() * 1e6)
        found = await explainer.explain(Asked("t", ENTITIES, SERVED, as_of_us))
        served = dict(zip(FEATURES, np.frombuffer(vector, "<f4").tolist(), strict=False))
        told = [np.nan if found.values[name] is None else found.values[name] for name in SERVED]
        equal.append(np.array_equal(told, [served[name] for name in SERVED], equal_nan=True))
    assert equal == [True] * 5 if known else not all(equal)
