"""A FastAPI endpoint over ONNX Runtime, and a client that loads it.

usage: python fastapi_onnx.py MODEL.onnx VECTORS.npy ROWS BATCH CALLERS PORT

Starts uvicorn with one process, posts `BATCH` rows a call as JSON, `CALLERS` calls in flight at
once, and prints one JSON object. The model runs in the endpoint's process, on one thread; orjson
reads and writes the bodies; uvloop and httptools are installed.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import onnxruntime
import orjson
from fastapi import FastAPI, Request, Response


def endpoint(model: str) -> FastAPI:
    """POST /score: {"rows": [[...], ...]} to {"scores": [...]}."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    app = FastAPI()

    @app.post("/score")
    async def score(request: Request) -> Response:
        rows = np.array(orjson.loads(await request.body())["rows"], np.float32)
        (found,) = session.run(["score"], {given.name: rows})
        body = orjson.dumps({"scores": found.reshape(-1).tolist()})
        return Response(body, media_type="application/json")

    return app


def app() -> FastAPI:
    """For uvicorn."""
    return endpoint(os.environ["BENCH_MODEL"])


async def _ready(session: aiohttp.ClientSession, url: str) -> None:
    for _ in range(100):
        try:
            async with session.get(f"{url}/docs"):
                return
        except aiohttp.ClientConnectorError:
            await asyncio.sleep(0.1)
    raise TimeoutError("the endpoint did not start")


async def load(url: str, vectors: Any, batch: int, callers: int) -> dict[str, float]:
    """Post every row once; the figures."""
    bodies = [
        orjson.dumps({"rows": vectors[start : start + batch].tolist()})
        for start in range(0, len(vectors), batch)
    ]
    total = 0.0

    async def caller(session: aiohttp.ClientSession, queue: Iterator[bytes]) -> None:
        nonlocal total
        for body in queue:
            async with session.post(f"{url}/score", data=body) as answer:
                answer.raise_for_status()
                total += sum(orjson.loads(await answer.read())["scores"])

    async with aiohttp.ClientSession() as session:
        await _ready(session, url)
        for part in (bodies[: len(bodies) // 10], bodies):
            total = 0.0
            queue = iter(part)
            began = time.perf_counter()
            await asyncio.gather(*(caller(session, queue) for _ in range(callers)))
            took = time.perf_counter() - began
    return {"records": len(vectors), "seconds": took, "sum": total}


def main() -> None:
    """Start the endpoint, load it, stop it."""
    model, file, rows, batch, callers, port = sys.argv[1:]
    argv = [sys.executable, "-m", "uvicorn", "--factory", f"{Path(__file__).stem}:app"]
    more = ["--port", port, "--log-level", "warning", "--no-access-log"]
    told = {**os.environ, "BENCH_MODEL": model}
    with subprocess.Popen([*argv, *more], cwd=Path(__file__).parent, env=told) as server:
        try:
            vectors = np.load(file)[: int(rows)]
            url = f"http://127.0.0.1:{port}"
            figures = asyncio.run(load(url, vectors, int(batch), int(callers)))
        finally:
            server.terminate()
    print(json.dumps({"figures": figures}), flush=True)


if __name__ == "__main__":
    main()
