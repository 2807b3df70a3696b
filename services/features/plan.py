"""What features reads and writes, decided by the views."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
import polars as pl

from causemesh.catalogue import Topic
from causemesh.codec.columns import frame_schema
from causemesh.runner import Batch
from services.features.domain.definitions import FeatureView
from services.features.domain.transforms import Transforms

REQUESTS = "inference.requests.v1"
VERSIONS = "models.versions.v1"
ROLLOUTS = "models.rollouts.v1"


def tasks_topic(lane: str) -> str:
    """The topic of a lane's tasks."""
    return f"inference.tasks.{lane}.v1"


@dataclass(frozen=True)
class Plan:
    """What is read how, decided by the views."""

    views: tuple[FeatureView, ...]
    rekeyed: tuple[str, ...]
    """Event topics that the re-keying stage reads."""
    shared: tuple[str, ...]
    broadcast: tuple[str, ...]
    """Event topics of the joining stage: its own partition of them, or all."""
    transforms: Transforms = field(default_factory=Transforms)

    @classmethod
    def of(cls, views: Sequence[FeatureView], transforms: Transforms | None = None) -> Plan:
        """Broadcast wins where an event serves both a broadcast and a partitioned view."""
        by: dict[str, set[str]] = {"rekeyed": set(), "partitioned": set(), "broadcast": set()}
        for view in views:
            by[view.placement].add(f"events.{view.event_type}")
        return cls(
            tuple(views),
            tuple(sorted(by["rekeyed"])),
            tuple(sorted(by["partitioned"] - by["broadcast"])),
            tuple(sorted(by["broadcast"])),
            transforms or Transforms(),
        )


def event_frame(batch: Batch) -> pl.DataFrame:
    """A batch of events as the engine reads it.

    A view's events come from one topic, so their partition and position break ties of time.
    """
    return batch.frame.hstack(
        [
            pl.Series("occurred_at_us", batch.occurred_at_us),
            pl.Series("source", np.full(len(batch), batch.partition, dtype=np.int64)),
            pl.Series("position", batch.positions),
        ]
    )


LAKE_PLACE = ("_partition", "_position")
"""The columns of a row in the lake that say where in the log it lay."""


def lake_frame(topic: Topic, rows: pl.DataFrame, columns: Collection[str]) -> pl.DataFrame:
    """The same of the rows of a topic's table in the lake, of which these columns are wanted."""
    placed = [
        rows["occurred_at"].cast(pl.Int64).alias("occurred_at_us"),
        rows["_partition"].cast(pl.Int64).alias("source"),
        rows["_position"].alias("position"),
    ]
    return pl.DataFrame([*as_decoded(topic, rows, columns), *placed])


def as_decoded(topic: Topic, rows: pl.DataFrame, columns: Collection[str]) -> list[pl.Series]:
    """Columns of the lake as the codec decodes them with the record as it is declared now.

    A row written before a field was added has null in it, where a reader of the log finds the
    field's default.
    """
    types = frame_schema(topic.record)
    made = []
    for one in topic.record["fields"]:
        name = one["name"]
        if name not in columns:
            continue
        if name in rows.columns:
            column = rows[name].cast(types[name])
        else:
            column = pl.repeat(None, rows.height, dtype=types[name], eager=True).alias(name)
        default = one.get("default")
        if default is not None and not isinstance(one["type"], list) and column.null_count():
            column = column.fill_null(default)
        made.append(column)
    return made
