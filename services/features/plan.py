"""What features reads and writes, decided by the views."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import polars as pl

from causemesh.catalogue import Catalogue
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


def source_numbers(catalogue: Catalogue) -> Callable[[str, int], int]:
    """Numbers for (topic, partition) that are equal in every process: they break ties."""
    order = {name: number for number, name in enumerate(sorted(catalogue.topics))}
    return lambda topic, partition: order[topic] * 10_000 + partition


def event_frame(batch: Batch, source: int) -> pl.DataFrame:
    """A batch of events as the engine reads it."""
    return batch.frame.hstack(
        [
            pl.Series("occurred_at_us", batch.occurred_at_us),
            pl.Series("source", np.full(len(batch), source, dtype=np.int64)),
            pl.Series("position", batch.positions),
        ]
    )
