"""Live requests over REST, one at a time: what a caller waits for a prediction."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np

from causemesh.errors import Fatal
from causemesh.local.mesh import Mesh
from examples.flights.dataset import MODEL, Replay

TENANT = "probe"
"""A tenant of its own, so that airlines are not billed for it."""
_WARM_UP = 20
_ASKED = 200


async def probe(mesh: Mesh, replay: Replay) -> dict[str, float]:
    """Percentiles in milliseconds of `POST /v1/predictions`, after a few to warm up.

    Raises Fatal for an answer that is no prediction.
    """
    headers = {"Authorization": f"Bearer {mesh.token}"}
    rows = replay.requests.tail(_WARM_UP + _ASKED).to_dicts()
    taken = []
    async with httpx.AsyncClient(base_url=mesh.url("ingest"), headers=headers) as api:
        for number, row in enumerate(rows):
            ask = {
                "tenant_id": TENANT,
                "model": MODEL,
                "request_id": f"probe-{number}",
                "entities": {one["name"]: one["value"] for one in row["entities"]},
                "inputs": {one["name"]: one["value"] for one in row["inputs"]},
            }
            began = time.perf_counter()
            answer = await api.post("/v1/predictions", json=ask, timeout=30.0)
            taken.append((time.perf_counter() - began) * 1000)
            if answer.status_code != 200:
                raise Fatal(f"a live prediction answered {answer.status_code}: {answer.text[:300]}")
    p50, p99 = np.percentile(taken[_WARM_UP:], [50, 99])
    return {"requests": _ASKED, "p50_ms": round(float(p50), 1), "p99_ms": round(float(p99), 1)}


def pages(api: httpx.Client, path: str, **params: Any) -> Iterator[dict[str, Any]]:
    """Every item of a paged list. Raises Fatal with the reason of a refusal."""
    cursor = None
    while True:
        more: dict[str, Any] = {} if cursor is None else {"cursor": cursor}
        answer = api.get(path, params={**params, **more, "limit": 500})
        if answer.is_error:
            raise Fatal(f"{path} answered {answer.status_code}: {answer.text[:300]}")
        page = answer.json()
        yield from page["items"]
        cursor = page["next_cursor"]
        if cursor is None:
            return
