"""Train the next version from what the mesh logged: `python -m examples.flights.training`.

The vectors are those that the model was asked with, read back from inference.predictions.v1, and
the labels are the landings on events.flight_landed. Nothing is recomputed, so there is no skew
between training and serving.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import polars as pl

from causemesh.cli.context import Connections, connections, mesh_at
from causemesh.errors import Fatal, Misdeclared
from causemesh.local.mesh import Mesh
from examples.flights import model
from examples.flights.dataset import MODEL

PREDICTIONS = "inference.predictions.v1"
LANDINGS = "events.flight_landed"
BEGINNING = datetime(2012, 12, 1, tzinfo=UTC)
_KNOWN_S = 30.0


async def logged(open_to: Connections, until: datetime) -> pl.DataFrame:
    """Every request that was asked before `until` and has landed by then.

    Columns: occurred_at, vector (bytes), positive; by event time and request id.
    """
    asked = await _read(open_to, PREDICTIONS, ["request_id", "occurred_at", "outcome", "vector"])
    landed = await _read(open_to, LANDINGS, ["flight_id", "occurred_at", "arrival_delay_minutes"])
    labels = landed.filter(pl.col("occurred_at") < until).select(
        request_id=model.LABEL["request_id"], positive=pl.sql_expr(model.LABEL["positive"])
    )
    past = (pl.col("occurred_at") < until) & (pl.col("outcome") == "predicted")
    known = asked.filter(past).join(labels, on="request_id")
    return known.sort("occurred_at", "request_id")


async def _read(open_to: Connections, topic: str, columns: Sequence[str]) -> pl.DataFrame:
    spans = await open_to.log.ends([topic])
    frames = [batch.frame.select(columns) async for batch in open_to.log.read(spans)]
    if not frames:
        raise Misdeclared(f"{topic} is empty: replay some months first (make demo)")
    return pl.concat(frames)


def fit(known: pl.DataFrame) -> model.Trained:
    """Train on logged vectors."""
    joined = b"".join(known["vector"].to_list())
    vectors = np.frombuffer(joined, dtype="<f4").reshape(known.height, len(model.FEATURES))
    times = known["occurred_at"].to_physical().to_numpy()
    return model.train(np.ascontiguousarray(vectors), known["positive"].to_numpy(), times)


def register(
    mesh: Mesh,
    version: int,
    onnx: bytes,
    *,
    reference: Sequence[Any] = (),
    metrics: Sequence[Any] = (),
) -> None:
    """Upload an artefact and register it as a version. Raises Fatal with the API's reason."""
    with mesh.client("inference") as api:
        digest = _checked(api.put("/v1/artefacts", content=onnx))["sha256"]
        ask = {
            "version": version,
            "features": list(model.FEATURES),
            "required": list(model.REQUIRED),
            "artefact_sha256": digest,
            "label": model.LABEL,
            "reference": list(reference),
            "metrics": {one["name"]: one["value"] for one in metrics},
        }
        _checked(api.post(f"/v1/models/{MODEL}/versions", json=ask))


def roll_out(mesh: Mesh, schedule: Sequence[tuple[int, datetime]]) -> None:
    """Set the schedule and wait until every partition of features knows it.

    So no request is answered by an older schedule than the one in force when it was sent.
    """
    entries = [{"version": v, "effective_at": at.isoformat()} for v, at in schedule]
    with mesh.client("inference") as api:
        _checked(api.put(f"/v1/models/{MODEL}/schedule", json=entries))
    versions = {f"{MODEL}@{version}" for version, _ in schedule}
    wanted = [version for version, _ in schedule]
    deadline = time.monotonic() + _KNOWN_S
    with mesh.client("features") as api:
        while not _known(api, versions, wanted):
            if time.monotonic() > deadline:
                raise Fatal(f"features did not hear of {sorted(versions)} in {_KNOWN_S:.0f} s")
            time.sleep(0.2)


def _known(api: httpx.Client, versions: set[str], schedule: Sequence[int]) -> bool:
    try:
        partitions = _checked(api.get("/v1/models")).values()
    except httpx.TransportError:  # it is being started again
        return False
    return bool(partitions) and all(
        versions <= set(one["versions"])
        and [entry["version"] for entry in one["schedules"].get(MODEL, [])] == list(schedule)
        for one in partitions
    )


def _checked(answer: httpx.Response) -> dict[str, Any]:
    if answer.is_error:
        raise Fatal(f"{answer.request.url.path} answered {answer.status_code}: {answer.text[:300]}")
    document: dict[str, Any] = answer.json()
    return document


async def _main(home: Path, until: datetime, version: int) -> None:
    mesh = mesh_at(home)
    async with connections(home) as open_to:
        known = await logged(open_to, until)
    trained = fit(known)
    print(f"{known.height} labelled requests before {until:%Y-%m-%d}")
    print(f"AUC {trained.auc:.4f} on the last quarter by time, of a fit on what came before")
    register(mesh, version, trained.onnx, reference=trained.reference, metrics=trained.metrics)
    roll_out(mesh, [(1, BEGINNING), (version, until)])
    print(f"version {version} answers from {until:%Y-%m-%d} on")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--home", type=Path, default=Path(".causemesh"))
    parser.add_argument("--until", default="2013-03-01", help="train on what was known then (UTC)")
    parser.add_argument("--version", type=int, default=2)
    told = parser.parse_args()
    at = datetime.fromisoformat(told.until).replace(tzinfo=UTC)
    asyncio.run(_main(told.home, at, told.version))
