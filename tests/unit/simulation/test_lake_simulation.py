"""Random lives of lake writers: crashes, zombies, lost answers, rollbacks, compaction, repeats.

Whatever happens, at the end the table holds each record's cause once, and nothing else.
"""

from __future__ import annotations

import os
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import pytest
from pyiceberg.table.snapshots import ancestors_of

from causemesh.errors import Retryable
from causemesh.faultpoints import Point, arm
from causemesh.lake import upkeep
from causemesh.lake.progress import progress_in
from services.features.lake.store import LakeStore
from tests.unit.lake.mesh import LakeMesh
from tests.unit.lake.test_lake_writing import BlindStore

SEEDS = int(os.environ.get("CAUSEMESH_LAKE_SEEDS", "8"))
STEPS = 14
TABLE = "decoded.inference_predictions_v1"
FAULTS = (Point.LAKE_WRITING, Point.LAKE_WRITTEN, Point.LAKE_COMMITTED)
LIMITS = upkeep.UpkeepLimits(small_files=2, snapshot_s=0, snapshots=3, orphan_s=3_600)


class Lives:
    """One seed: writers that are alive, the present one last."""

    def __init__(self, seed: int, folder: Path, store: type[LakeStore]) -> None:
        self.random = random.Random(seed)
        self.mesh = LakeMesh(folder, curated=(), store=store)
        self.writers: list[LakeStore] = []
        self.sent = 0

    async def run(self) -> list[str]:
        """The events in the table at the end."""
        steps: list[Callable[[], Awaitable[None]]] = [
            self.produce, self.produce, self.begin, self.go_on, self.zombie, self.lost, self.keep,
            self.roll_back,
        ]  # fmt: skip
        await self.produce()
        await self.begin()
        for _ in range(STEPS):
            await self.random.choice(steps)()
        for old in self.writers:  # whoever still lives has its say
            await old.flush()
        await self.mesh.write_all()
        for old in self.writers:
            await old.flush()
        with self.mesh.lake() as lake:
            return sorted(lake.select(TABLE, columns=["event_id"]).lazy().collect()["event_id"])

    async def produce(self) -> None:
        """New records, and some that were sent before."""
        again = self.random.randint(0, min(3, self.sent))
        count = self.random.randint(1, 9)
        await self.mesh.predict(self.sent - again, count + again)
        self.sent += count

    async def begin(self) -> None:
        """A writer takes over; the one before it doesn't know."""
        self.writers.append(self.mesh.store())
        await self.mesh.read_all(self.writers[-1], 0)

    async def go_on(self) -> None:
        await self.writers[-1].flush()

    async def zombie(self) -> None:
        await self.random.choice(self.writers).flush()

    async def lost(self) -> None:
        """A commit fails at some step, perhaps after it came through."""
        arm(f"{self.random.choice(FAULTS)}:error")
        with suppress(Retryable):
            await self.writers[-1].flush()
        arm("")

    async def keep(self) -> None:
        catalog = self.mesh.catalog()
        upkeep.compact(catalog, TABLE, LIMITS)
        upkeep.expire(catalog, TABLE, LIMITS)
        catalog.close()

    async def roll_back(self) -> None:
        with self.mesh.lake() as lake:
            table = lake.table(TABLE)
            past = [
                one.snapshot_id
                for one in ancestors_of(table.current_snapshot(), table.metadata)
                if progress_in(one) is not None
            ]
            chosen = self.random.choice(past)
            table.manage_snapshots().rollback_to_snapshot(chosen).commit()


@pytest.mark.parametrize("seed", range(SEEDS))
async def test_the_table_holds_every_cause_once(seed: int, tmp_path: Path) -> None:
    lives = Lives(seed, tmp_path, LakeStore)
    assert await lives.run() == sorted(f"p{n}" for n in range(lives.sent))


async def test_control_without_epoch_and_position_some_seed_doubles(tmp_path: Path) -> None:
    for seed in range(SEEDS):
        (tmp_path / str(seed)).mkdir()
        lives = Lives(seed, tmp_path / str(seed), BlindStore)
        if await lives.run() != sorted(f"p{n}" for n in range(lives.sent)):
            return
    pytest.fail("no seed needed the protections")
