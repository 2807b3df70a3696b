"""Events to view inputs keyed by the view's entity, for views keyed otherwise than their event."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import polars as pl

from causemesh.runner import Batch, Outgoing
from services.features.domain.definitions import FeatureView
from services.features.domain.events import NULL, SEPARATOR, ViewEvents
from services.features.domain.vectors import row_bytes

INPUTS = "features.inputs.v1"


def inputs_of(batch: Batch, found: Sequence[tuple[FeatureView, ViewEvents]]) -> Outgoing:
    """The view inputs of one batch of events, in cause order; the index stands for the view."""
    parts = [
        pl.DataFrame(
            {
                "view": pl.repeat(view.id, len(events), dtype=pl.String, eager=True),
                "entity": events.entity,
                "columns": pl.Series(packed_columns(events), dtype=pl.Binary),
                "occurred_at": pl.Series(events.occurred_at_us).cast(pl.Datetime("us", "UTC")),
                "position": events.position,
                "index": pl.repeat(view_index(view), len(events), dtype=pl.Int32, eager=True),
                "key": routing_keys(view, events.entity),
            }
        )
        for view, events in found
    ]
    frame = pl.concat(parts).sort("position", "index")
    tenants = pl.DataFrame({"position": batch.positions, "tenant_id": batch.frame["tenant_id"]})
    frame = frame.join(tenants, on="position", how="left", maintain_order="left")
    return Outgoing(
        INPUTS,
        frame.drop("position", "index", "key"),
        [None if key is None else key.encode() for key in frame["key"].to_list()],
        batch.topic,
        batch.partition,
        frame["position"].to_numpy(),
        frame["index"].to_numpy(),
    )


def view_index(view: FeatureView) -> int:
    """What stands for a view in the index of its inputs: the same whatever other views there are.

    A number by its place would change with the views: what is sent again after a view was added
    would be taken for news, or for a replay.
    """
    return zlib.crc32(view.id.encode()) & 0x7FFF_FFFF


def routing_keys(view: FeatureView, entities: pl.Series) -> pl.Series:
    """The message keys of entities: the first entity column, by which the request is routed too."""
    place = 1 if view.scope == "tenant" else 0
    parts = entities.str.split(SEPARATOR)
    first = parts.list.get(place)
    if len(view.entity) == 1:
        return first
    # only the last part of a key is not escaped (see entity_keys)
    unescaped = first.str.replace_all("\x1e1", SEPARATOR, literal=True)
    return unescaped.str.replace_all("\x1e0", "\x1e", literal=True)


def packed_columns(events: ViewEvents) -> list[bytes]:
    """Each event's inputs as float64 little-endian grid units, NaN where absent."""
    values = np.where(events.values == NULL, np.nan, events.values.astype(np.float64))
    return row_bytes(values.T, "<f8")


def unpacked(view: FeatureView, frame: pl.DataFrame, source: int) -> ViewEvents:
    """The view's events from rows of the inputs topic (with the position of their cause)."""
    width = len(view.columns)
    joined = b"".join(frame["columns"].to_list())
    numbers = np.frombuffer(joined, dtype="<f8").reshape(frame.height, width).T
    absent = np.isnan(numbers)
    values = np.where(absent, 0.0, numbers).astype(np.int64)
    values[absent] = NULL
    return ViewEvents(
        frame["entity"],
        frame["occurred_at"].to_physical().to_numpy(),
        np.full(frame.height, source, dtype=np.int64),
        frame["cause"].struct.field("position").to_numpy(),
        values,
    )
