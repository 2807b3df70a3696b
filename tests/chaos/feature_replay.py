"""Spans of event time sent to a mesh of features with all its state in files, and what it says."""

from __future__ import annotations

import asyncio
import random

from tests.chaos.feature_mesh import (
    HOUR_US,
    PARTITIONS,
    VECTORS,
    FeatureMesh,
    readings,
    until,
)

MINUTE_US = HOUR_US // 60
SPAN_US = 10 * MINUTE_US
COUNT = 120  # events of a span
SETTINGS = {
    "CAUSEMESH_CHECKPOINT_INLINE_KB": "0",
    "CAUSEMESH_COMMIT_EVERY_UNITS": "1",
    "CAUSEMESH_COMMIT_EVERY_S": "0.05",
    "CAUSEMESH_PUBLISH_SECONDS": "0.1",
}


class Replay:
    """Sends spans of event time, one after the other, while features is
    disturbed."""

    def __init__(self, mesh: FeatureMesh, rng: random.Random, pause_s: float = 0.1) -> None:
        self._mesh = mesh
        self._rng = rng
        self._pause_s = pause_s
        self.sent = 0
        self.until_us = 24 * HOUR_US
        self._stop = asyncio.Event()

    async def run(self) -> None:
        """Until `stop`."""
        while not self._stop.is_set():
            await self.span()
            await asyncio.sleep(self._pause_s)

    async def span(self) -> None:
        """One span, and the watermark behind it."""
        until_us = self.until_us + SPAN_US
        rows = readings(self._rng, self.until_us, until_us, self.sent, COUNT)
        await self._mesh.send(rows, until_us)
        self.sent += COUNT
        self.until_us = until_us

    def stop(self) -> None:
        """After the span in progress."""
        self._stop.set()


async def rows_committed(mesh: FeatureMesh) -> bool:
    """Whether every partition has a checkpoint."""
    return len(await mesh.rows()) == PARTITIONS


async def settled(mesh: FeatureMesh, until_us: int) -> None:
    """Until every partition has committed the last watermark."""

    async def all_committed() -> bool:
        return all(row.watermark_us == until_us for row in await mesh.rows())

    await until(all_committed)


async def last_vectors(mesh: FeatureMesh, until_us: int) -> list[tuple[str, str, int, bytes]]:
    """Each entity's record with the highest sequence, once the last ones are published."""

    async def published() -> bool:
        records = await mesh.log(VECTORS)
        return int(records["sequence"].to_numpy().max()) == until_us

    await until(published)
    await asyncio.sleep(1.0)  # the other partition may be a little behind
    records = (await mesh.log(VECTORS)).sort("sequence", maintain_order=True)
    last = records.group_by("view", "entity", maintain_order=True).last()
    return last.select("view", "entity", "sequence", "vector").rows()
