"""tritonclient alone: rows from memory to scores in memory, no broker.

usage: python triton_direct.py URL MODEL VECTORS.npy ROWS BATCH CALLERS

Prints one JSON object. `CALLERS` calls of `BATCH` rows are in flight at once.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tritonclient.grpc import InferInput, InferRequestedOutput
from tritonclient.grpc.aio import InferenceServerClient


def peak_rss_mb() -> float:
    """Most memory of this process so far; getrusage would count what its parent had at the fork."""
    told = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(told[1]) / 1000 if told else 0.0


async def main() -> None:
    """Score every row once."""
    url, model, file, rows, batch, callers = sys.argv[1:]
    vectors = np.load(file)[: int(rows)]
    client = InferenceServerClient(url)
    scores = np.full(len(vectors), np.nan)
    output = [InferRequestedOutput("score")]

    async def caller(starts: Iterator[int]) -> None:
        for start in starts:
            part = vectors[start : start + int(batch)]
            tensor = InferInput("features", list(part.shape), "FP32")
            tensor.set_data_from_numpy(part)
            answer = await client.infer(model, [tensor], outputs=output)
            scores[start : start + int(batch)] = answer.as_numpy("score").reshape(-1)

    async def score(count: int) -> None:
        starts = iter(range(0, count, int(batch)))
        await asyncio.gather(*(caller(starts) for _ in range(int(callers))))

    await score(len(vectors) // 10)
    began, cpu = time.perf_counter(), time.process_time()
    await score(len(vectors))
    figures = {
        "records": len(vectors),
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - cpu,
        "sum": float(scores.sum()),
        "peak_rss_mb": peak_rss_mb(),
    }
    await client.close()
    print(json.dumps({"figures": figures}), flush=True)


asyncio.run(main())
