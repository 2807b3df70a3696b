"""How often a worker commits while records come, and that it does so at once when none do."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest

from causemesh.bus.base import Outbound
from causemesh.bus.memory import MemoryBus
from causemesh.runner import Batch, Emission, Limits, PartitionWorker
from tests.unit.kit.workers import INBOX, inbox_worker

UNITS, UNIT_S = 64, 0.125


class Snapshots:
    """Counts its snapshots; each unit takes an eighth of a second and brings the next record."""

    takes_bad_rows = True

    def __init__(self, bus: MemoryBus, *, stateful: bool) -> None:
        self.stateful = stateful
        self.taken: list[float] = []
        self.units = 0
        self.now_s = 0.0
        self._bus = bus
        self.worker: PartitionWorker | None = None

    async def process(
        self, batches: Sequence[Batch], watermark_us: int, transaction: Any
    ) -> Emission:
        self.units += bool(batches)
        self.now_s += UNIT_S
        if batches and self.units < UNITS:
            await self._bus.producer("p").send([Outbound(INBOX, 0, [None], [b"no record"])])
        if not batches:
            assert self.worker is not None
            self.worker.stopping = True
        return Emission()

    def snapshot(self) -> bytes | None:
        self.taken.append(self.now_s)
        return b"state"

    def restore(self, state: bytes | None) -> None: ...

    def now_us(self) -> int:
        return 0

    def monotonic(self) -> float:
        return self.now_s

    async def sleep(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.mark.parametrize(
    ("stateful", "limits", "under_load"),
    [
        (True, Limits(commit_every_units=20), 3),
        (True, Limits(commit_every_units=20, commit_every_s=1.0), 3),
        (True, Limits(commit_every_units=5, commit_every_s=1.0), 8),
        (True, Limits(commit_every_units=5), 12),
        (False, Limits(), 64),
        (False, Limits(commit_every_s=1.0), 8),
    ],
)
async def test_commits_keep_both_distances(stateful: bool, limits: Limits, under_load: int) -> None:
    bus = MemoryBus()
    bus.create(INBOX, 1)
    await bus.producer("p").send([Outbound(INBOX, 0, [None], [b"no record"])])
    processor = Snapshots(bus, stateful=stateful)
    worker = inbox_worker(bus, processor, processor, limits)
    await worker.run()
    loaded = [at for at in processor.taken if at <= UNITS * UNIT_S + UNIT_S / 2]
    assert len(loaded) == under_load
    assert worker.positions[(INBOX, 0)] == UNITS - 1
    if limits.commit_every_s:
        gaps = [later - at for at, later in pairwise(loaded)]
        assert min(gaps) >= limits.commit_every_s


class Changing(Snapshots):
    """Asks for a commit in its third unit, in which nothing came."""

    asks = True

    async def process(
        self, batches: Sequence[Batch], watermark_us: int, transaction: Any
    ) -> Emission:
        assert self.worker is not None
        self.units += 1
        self.worker.stopping = self.units == 4
        return Emission(commit=self.asks and self.units == 3)


@pytest.mark.parametrize("asks", [True, False])
async def test_what_changed_by_itself_is_committed_at_once(asks: bool) -> None:
    bus = MemoryBus()
    bus.create(INBOX, 1)
    processor = Changing(bus, stateful=True)
    processor.asks = asks
    worker = inbox_worker(
        bus, processor, processor, Limits(commit_every_units=20, max_wait_s=0.001)
    )
    await worker.run()
    assert len(processor.taken) == asks
