"""Work that nobody waits for lets records gather; a worker that is behind does not wait."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from causemesh.bus.base import Outbound, TopicPartition
from causemesh.bus.memory import MemoryBus
from causemesh.runner import Batch, Emission, Limits, PartitionWorker
from tests.unit.kit.workers import CATALOGUE, INBOX, inbox_worker


class Units:
    """Notes how many bad rows each unit brought, and ends the worker once nothing comes after
    enough of them."""

    takes_bad_rows = True
    stateful = False

    def __init__(self, records: int) -> None:
        self.sizes: list[int] = []
        self.left = records
        self.worker: PartitionWorker | None = None

    async def process(
        self, batches: Sequence[Batch], watermark_us: int, transaction: Any
    ) -> Emission:
        size = sum(len(batch.bad) for batch in batches)
        self.sizes += [size] if size else []
        self.left -= size
        assert self.worker is not None
        self.worker.stopping = not self.left and not size
        return Emission()

    def snapshot(self) -> bytes | None:
        return None

    def restore(self, state: bytes | None) -> None: ...


class ProducingClock:
    """While somebody sleeps, three records come."""

    def __init__(self, bus: MemoryBus, records: int) -> None:
        self._bus = bus
        self._left = records
        self.slept: list[float] = []

    def now_us(self) -> int:
        return 0

    def monotonic(self) -> float:
        return 0.0

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        count = min(3, self._left)
        self._left -= count
        values = [b"no record"] * count
        await self._bus.producer("p").send([Outbound(INBOX, 0, [None] * count, values)])


@pytest.mark.parametrize(
    ("limits", "sizes", "slept"),
    [
        (Limits(gather_s=0.25), [1, 3, 3], [0.25, 0.25, 0.25]),
        (Limits(gather_s=0.25, max_records=1), [1] * 7, []),  # behind: every fetch is full
        (Limits(), [7], []),
        (Limits(bulk_records=3, bulk_gather_s=0.1), [7], [0.1]),  # all at once
        (Limits(bulk_records=1, bulk_gather_s=0.1), [1, 3, 3], [0.1, 0.1, 0.1]),
        (Limits(bulk_records=1, bulk_gather_s=0.1, max_records=1), [1] * 7, []),
        (Limits(bulk_records=8, bulk_gather_s=0.1), [7], []),  # few come: nobody waits for more
    ],
)
async def test_records_gather_only_where_asked_and_not_behind(
    limits: Limits, sizes: list[int], slept: list[float]
) -> None:
    bus = MemoryBus()
    for topic in CATALOGUE.topics.values():
        bus.create(topic.name, topic.partitions)
    now = sizes[0] if slept else 7
    await bus.producer("p").send([Outbound(INBOX, 0, [None] * now, [b"no record"] * now)])
    units, clock = Units(7), ProducingClock(bus, 7 - now)
    await inbox_worker(bus, units, clock, replace(limits, max_wait_s=0.0)).run()
    assert units.sizes == sizes
    assert clock.slept == slept


class Cut(MemoryBus):
    """Hands out no more than two records at a time, as a broker may that looks at bytes."""

    def reader(self, after: Mapping[TopicPartition, int]) -> Any:
        reader = super().reader(after)
        fetch = reader.fetch
        reader.fetch = lambda most, wait_s: fetch(min(most, 2), wait_s)  # type: ignore[method-assign]
        return reader


async def test_a_worker_that_gets_less_than_fits_is_behind_where_the_log_holds_more() -> None:
    bus = Cut()
    for topic in CATALOGUE.topics.values():
        bus.create(topic.name, topic.partitions)
    await bus.producer("p").send([Outbound(INBOX, 0, [None] * 7, [b"no record"] * 7)])
    units, clock = Units(7), ProducingClock(bus, 0)
    await inbox_worker(bus, units, clock, Limits(gather_s=0.25, max_wait_s=0.0)).run()
    assert units.sizes == [2, 2, 2, 1]
    assert clock.slept == [0.25]  # behind the last


class StoppingClock(ProducingClock):
    """After some sleeps the worker is told to stop."""

    worker: PartitionWorker | None = None

    async def sleep(self, seconds: float) -> None:
        await super().sleep(seconds)
        assert self.worker is not None
        self.worker.stopping = len(self.slept) == 3


async def test_a_worker_that_is_told_to_stop_does_not_gather_to_the_end() -> None:
    """Its partition's next owner waits for it."""
    bus = MemoryBus()
    for topic in CATALOGUE.topics.values():
        bus.create(topic.name, topic.partitions)
    await bus.producer("p").send([Outbound(INBOX, 0, [None], [b"no record"])])
    clock = StoppingClock(bus, 0)
    clock.worker = inbox_worker(bus, Units(7), clock, Limits(gather_s=60.0, max_wait_s=0.0))
    await clock.worker.run()
    assert clock.slept == [0.5] * 3
