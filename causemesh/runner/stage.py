"""What a worker is told: its topics and its bounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from causemesh.bus.base import TopicPartition
from causemesh.catalogue import Catalogue


@dataclass(frozen=True)
class Limits:
    """Bounds of a worker. Times are in seconds.

    `gather_s` is how long a worker that is not behind lets records gather before its next unit:
    work that nobody waits for should not take the processor from work that somebody does.
    `commit_every_s` is the least time between two commits while records come. It is for a processor
    that writes nothing in the transaction: its position may lag so long, because what it sends
    again after a crash has the same causes and is dropped. One with state is snapshotted at each
    commit, and small units come fast, so it has to wait for `commit_every_units` as well.
    `bulk_gather_s` is what `gather_s` is, after units with at least `bulk_records` of one partition
    only: they come in bulk, as in a replay, and each unit costs the same however few it has.
    """

    max_records: int = 5_000
    max_wait_s: float = 0.5
    attempts: int = 3
    retry_s: float = 0.2
    commit_every_units: int = 1
    gather_s: float = 0.0
    commit_every_s: float = 0.0
    bulk_records: int = 200
    bulk_gather_s: float = 0.0

    def pause_s(self, most: int) -> float:
        """How long to wait after a unit whose fullest partition gave `most` records."""
        if not 0 < most < self.max_records:  # nothing came, or more is waiting already
            return 0.0
        return max(self.gather_s, self.bulk_gather_s if most >= self.bulk_records else 0.0)


@dataclass(frozen=True)
class Stage:
    """What a worker reads and writes.

    `shared` topics are co-partitioned and read on the worker's own partition number; `broadcast`
    topics are read whole.
    """

    service: str
    group: str
    shared: tuple[str, ...]
    writes: tuple[str, ...] = ()
    broadcast: tuple[str, ...] = ()

    def inputs(self, catalogue: Catalogue, partition: int) -> list[TopicPartition]:
        """Every partition that the worker of `partition` reads."""
        broadcast = [
            (topic, number)
            for topic in self.broadcast
            for number in range(catalogue.topic(topic).partitions)
        ]
        return [(topic, partition) for topic in self.shared] + broadcast

    def sources(self, catalogue: Catalogue, source: TopicPartition) -> Sequence[TopicPartition]:
        """The cause sources whose watermarks must arrive on one input partition."""
        topic = source[0]
        if catalogue.topic(topic).form == "inbox":
            return [source]
        return catalogue.source_partitions(topic)
