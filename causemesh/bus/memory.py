"""A broker in memory, for tests and simulations.

Every externally visible step awaits `step(label)`; a simulation uses that to interleave, crash
and pause workers at each single step, records of a batch included.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from causemesh.bus.base import BEFORE_FIRST, Outbound, RawBatch, TopicPartition
from causemesh.catalogue import Topic
from causemesh.errors import Misdeclared, Retryable

Step = Callable[[str], Awaitable[None]]
_POLL_S = 0.005


async def no_step(label: str) -> None:
    """The default step: nothing happens in between."""


@dataclass
class _Log:
    keys: list[bytes | None] = field(default_factory=list)
    values: list[bytes] = field(default_factory=list)
    traceparents: list[bytes | None] = field(default_factory=list)


class MemoryBus:
    """Partitions as lists; positions are list indexes."""

    def __init__(self, step: Step = no_step) -> None:
        self.step = step
        self.logs: dict[TopicPartition, _Log] = {}
        self._groups: dict[str, list[MemoryMembership]] = {}
        self.reports: dict[str, dict[TopicPartition, int]] = {}

    def create(self, topic: str, partitions: int) -> bool:
        """Create `topic`; False when it exists. Raises Misdeclared on another partition count."""
        existing = self.partition_count(topic)
        if existing and existing != partitions:
            raise Misdeclared(f"{topic} has {existing} partitions, the catalogue says {partitions}")
        for partition in range(partitions):
            self.logs.setdefault((topic, partition), _Log())
        return not existing

    def partition_count(self, topic: str) -> int:
        """How many partitions `topic` has; 0 when it does not exist."""
        return sum(1 for name, _ in self.logs if name == topic)

    def log(self, topic: str, partition: int) -> _Log:
        """One partition's log; raises Misdeclared when it does not exist."""
        try:
            return self.logs[(topic, partition)]
        except KeyError:
            raise Misdeclared(f"{topic}[{partition}] does not exist on this bus") from None

    def reader(self, after: Mapping[TopicPartition, int]) -> MemoryReader:
        """See `Bus.reader`."""
        return MemoryReader(self, dict(after))

    def producer(self, name: str) -> MemoryProducer:
        """See `Bus.producer`."""
        return MemoryProducer(self)

    def membership(self, group: str, topics: Sequence[str]) -> MemoryMembership:
        """See `Bus.membership`."""
        counts = {self.partition_count(topic) for topic in topics}
        if len(counts) != 1:
            raise Misdeclared(f"{group}: {sorted(topics)} are not co-partitioned: {sorted(counts)}")
        member = MemoryMembership(self, group, counts.pop())
        self._groups.setdefault(group, []).append(member)
        self._rebalance(group)
        return member

    def admin(self) -> MemoryAdmin:
        """See `Bus.admin`."""
        return MemoryAdmin(self)

    async def close(self) -> None:
        """Nothing is held."""

    def leave(self, member: MemoryMembership) -> None:
        """Take `member` out of its group and hand its partitions to the others."""
        members = self._groups.get(member.group, [])
        if member in members:
            members.remove(member)
            self._rebalance(member.group)

    def _rebalance(self, group: str) -> None:
        members = self._groups[group]
        for rank, member in enumerate(members):
            owned = range(rank, member.partitions, len(members))
            member.assignments.put_nowait(frozenset(owned))


class MemoryReader:
    """Reads lists."""

    def __init__(self, bus: MemoryBus, after: dict[TopicPartition, int]) -> None:
        self._bus = bus
        self._after = after

    async def fetch(self, max_records: int, max_wait_s: float) -> list[RawBatch]:
        """See `Reader.fetch`."""
        await self._bus.step("fetch")
        batches = self._take(max_records)
        if not batches and max_wait_s > 0 and self._bus.step is no_step:
            await asyncio.sleep(min(max_wait_s, _POLL_S))
            batches = self._take(max_records)
        return batches

    def _take(self, max_records: int) -> list[RawBatch]:
        batches = []
        for (topic, partition), after in self._after.items():
            log = self._bus.log(topic, partition)
            end = min(len(log.values), after + 1 + max_records)
            if end > after + 1:
                positions = np.arange(after + 1, end, dtype=np.int64)
                rows = slice(after + 1, end)
                batch = RawBatch(
                    topic,
                    partition,
                    positions,
                    log.keys[rows],
                    log.values[rows],
                    np.zeros(len(positions), dtype=np.int64),
                    traces if any(traces := log.traceparents[rows]) else None,
                    more=end < len(log.values),
                )
                batches.append(batch)
                self._after[(topic, partition)] = end - 1
        return batches

    async def close(self) -> None:
        """See `Reader.close`."""


class MemoryProducer:
    """Appends to lists, record by record, with a step between any two."""

    def __init__(self, bus: MemoryBus) -> None:
        self._bus = bus

    async def send(self, outbound: Sequence[Outbound]) -> None:
        """See `Producer.send`."""
        for part in outbound:
            log = self._bus.log(part.topic, part.partition)
            traces = part.traceparents or itertools.repeat(None, len(part.values))
            for key, value, trace in zip(part.keys, part.values, traces, strict=True):
                log.keys.append(key)
                log.traceparents.append(trace)
                log.values.append(value)
                await self._bus.step("append")

    async def close(self) -> None:
        """See `Producer.close`."""


class MemoryMembership:
    """A member of an in-memory group."""

    def __init__(self, bus: MemoryBus, group: str, partitions: int) -> None:
        self.group = group
        self.partitions = partitions
        self.assignments: asyncio.Queue[frozenset[int]] = asyncio.Queue()
        self._bus = bus

    async def changed(self) -> frozenset[int]:
        """See `Membership.changed`."""
        return await self.assignments.get()

    async def report(self, positions: Mapping[TopicPartition, int]) -> None:
        """See `Membership.report`."""
        self._bus.reports.setdefault(self.group, {}).update(positions)

    async def close(self) -> None:
        """See `Membership.close`."""
        self._bus.leave(self)


class MemoryAdmin:
    """Admin over the lists."""

    def __init__(self, bus: MemoryBus) -> None:
        self._bus = bus

    async def ensure(self, topics: Sequence[Topic]) -> list[str]:
        """See `Admin.ensure`."""
        return [topic.name for topic in topics if self._bus.create(topic.name, topic.partitions)]

    async def ends(self, topics: Sequence[str]) -> dict[TopicPartition, int]:
        """See `Admin.ends`."""
        missing = [topic for topic in topics if not self._bus.partition_count(topic)]
        if missing:
            raise Retryable(f"this bus does not know {', '.join(sorted(missing))} (yet)")
        return {
            (topic, partition): len(log.values) - 1 if log.values else BEFORE_FIRST
            for (topic, partition), log in self._bus.logs.items()
            if topic in topics
        }

    async def reported(self, group: str) -> dict[TopicPartition, int]:
        """See `Admin.reported`."""
        return dict(self._bus.reports.get(group, {}))

    async def close(self) -> None:
        """Nothing is held."""
