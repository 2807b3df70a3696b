"""From which size on files are cheaper: a small state whole in the row, beside the same in files.

usage: python -m benchmarks.feature_checkpoints_sizes

Processor time of one checkpoint with 200 entities touched, less what Postgres and the disk do.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.feature_checkpoints_load import (
    HOUR_US,
    MINUTE_US,
    CountedFiles,
    Partition,
    fill,
    frame_of,
    opened,
    plain_view,
)

_SIZES = (100, 1_000, 3_000, 10_000, 30_000, 100_000)
_TOUCHED, _CHECKPOINTS = 200, 12


async def measure(entities: int, folder: Path) -> None:
    """One size."""
    partition = Partition(plain_view())
    partition.whole = True
    fill(partition, entities)
    rng, now_us = np.random.default_rng(1), 24 * HOUR_US
    files = CountedFiles(folder / str(entities))
    spent_ms, size = {}, 0
    for name, inline in (("row", 2**40), ("files", 0)):
        keeper = await opened(partition, files, 1, inline)
        took_ms = []
        for _ in range(_CHECKPOINTS):
            now_us += MINUTE_US
            keys = rng.integers(0, entities, _TOUCHED)
            partition.state.add_events("e", frame_of(keys, np.full(_TOUCHED, now_us), rng))
            partition.state.advance(now_us + MINUTE_US)
            began = time.process_time()
            state = await (await keeper.save()).written() or b""
            keeper.committed()
            took_ms.append((time.process_time() - began) * 1e3)
            size = len(state) if name == "row" else size
        spent_ms[name] = float(np.median(took_ms[2:]))
        await keeper.close()
    if not files.sizes["delta"]:
        raise RuntimeError("no file was written")
    print(
        f"{entities:,} entities, {size / 1024:,.0f} KiB: {spent_ms['row']:.2f} ms of CPU in the"
        f" row, {spent_ms['files']:.2f} ms in files"
    )


def main() -> None:
    """All sizes."""
    with tempfile.TemporaryDirectory(prefix="causemesh-checkpoints-") as folder:
        for entities in _SIZES:
            asyncio.run(measure(entities, Path(folder)))


if __name__ == "__main__":
    main()
