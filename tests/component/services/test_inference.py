"""Inference as a process: one outcome a task, whatever becomes of the model server."""

from __future__ import annotations

import asyncio
from typing import Any

import polars as pl
import pytest

from causemesh.catalogue import DEADLETTERS
from causemesh.local import Cluster
from tests.component.services.conftest import (
    PREDICTIONS,
    TASKS,
    VERSIONS,
    Outside,
    lookup_model,
    request,
    total_model,
)

pytestmark = pytest.mark.servers
COUNT = 100
AWAY = 8


async def ask(outside: Outside, tenant: str, model: str, rows: list[float], start: int = 0) -> None:
    """One request a row, as one batch for each partition."""
    for partition in range(4):
        asked = [
            request(tenant, f"r{start + n}", model, inputs=[{"name": "row", "value": row}])
            for n, row in enumerate(rows)
            if n % 4 == partition
        ]
        values = await outside.values("inbox.requests", asked)
        await outside.write("inbox.requests", values, partition)


async def test_one_outcome_a_task_whatever_dies(
    outside: Outside, triton: Cluster, lookup: str, tenant: str
) -> None:
    """Failing rows stand alone; the model server and then the process are killed; none is lost."""
    rows = [9.0 if n % 17 == 3 else float(n % 4) for n in range(COUNT)]
    await ask(outside, tenant, lookup, rows[:-AWAY])
    await outside.eventually(PREDICTIONS, tenant, COUNT - AWAY)

    # Away for longer than the runner is patient with an error that it does not know.
    triton.kill("triton")
    await ask(outside, tenant, lookup, rows[-AWAY:], start=COUNT - AWAY)
    await outside.eventually(TASKS, tenant, COUNT)
    await asyncio.sleep(4)
    assert (await outside.of(PREDICTIONS, tenant)).height == COUNT - AWAY
    outside.mesh.kill("inference")
    await asyncio.to_thread(triton.up)

    found = await outside.eventually(PREDICTIONS, tenant, COUNT)
    assert sorted(found["request_id"]) == sorted(f"r{n}" for n in range(COUNT))
    by_id = {row["request_id"]: row for row in found.iter_rows(named=True)}
    for n, row in enumerate(rows):
        told = by_id[f"r{n}"]
        if row == 9.0:
            assert (told["outcome"], told["score"]) == ("failed", None)
            assert told["reason"].startswith("model_error: ")
        else:
            assert (told["outcome"], told["score"], told["reason"]) == ("predicted", row / 4, None)
    # Each names its task as its cause.
    tasks = await outside.of(TASKS, tenant)
    assert set(found["cause"].struct.field("topic")) == {TASKS}
    assert found["vector"].sort().to_list() == tasks["vector"].sort().to_list()
    assert (await outside.written(DEADLETTERS)).height == 0


async def problem(outside: Outside, path: str, body: dict[str, Any]) -> tuple[int, str]:
    answer = await outside.ask("inference", "POST", path, json=body)
    assert answer.headers["content-type"] == "application/problem+json"
    return answer.status_code, answer.json()["type"].rpartition(":")[2]


async def test_a_version_is_registered_once_and_never_changes(
    outside: Outside, tenant: str
) -> None:
    model, path = f"m-{tenant}", f"/models/m-{tenant}/versions"
    two = (await outside.done("inference", "PUT", "/artefacts", content=total_model(2)))["sha256"]
    one = (await outside.done("inference", "PUT", "/artefacts", content=lookup_model()))["sha256"]
    asked = {"version": 1, "features": ["input.a", "input.b"], "artefact_sha256": two}
    answers = [await outside.ask("inference", "POST", path, json=asked) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [201, 200]
    assert answers[0].json() == answers[1].json()
    other = asked | {"features": ["input.b", "input.a"]}
    assert await problem(outside, path, other) == (409, "version_exists")
    narrow = asked | {"version": 2, "features": ["input.a"]}
    assert await problem(outside, path, narrow) == (422, "wrong_width")
    absent = asked | {"version": 2, "artefact_sha256": "0" * 64}
    assert await problem(outside, path, absent) == (422, "no_artefact")
    unknown = asked | {"version": 2, "lane": "nowhere"}
    assert await problem(outside, path, unknown) == (422, "misdeclared")
    # A lookup without a row of zeros in its table does not run; nothing is kept of it.
    broken = {"version": 2, "features": ["input.a", "input.b"], "artefact_sha256": one}
    assert (await problem(outside, path, broken))[0] == 422
    versions = await outside.done("inference", "GET", f"/models/{model}/versions")
    assert [row["version"] for row in versions] == [1]
    # Said once, though it was asked for twice.
    (told,) = (await outside.eventually_where(VERSIONS, pl.col("model") == model)).rows(named=True)
    assert told["cause"]["topic"] == "outbox.inference"


async def test_a_body_that_is_no_model_is_refused(outside: Outside) -> None:
    answer = await outside.ask("inference", "PUT", "/artefacts", content=b"no model")
    assert (answer.status_code, answer.json()["type"]) == (422, "urn:causemesh:problem:not_onnx")
    refused = await outside.ask("inference", "GET", "/models", headers={"Authorization": "no"})
    assert refused.status_code == 401
