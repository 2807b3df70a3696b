"""Features ended by kill -9 again and again during a replay, with its state in files.

The vectors it ends with are those of a clean recomputation from the events' log, bit for bit.
"""

from __future__ import annotations

import asyncio
import os
import random
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from causemesh.errors import Fatal
from tests.chaos.feature_mesh import (
    HOUR_US,
    PARTITIONS,
    TENANT,
    VIEWS,
    FeatureMesh,
    Recomputed,
    opened,
    readings,
    shown,
    until,
)
from tests.chaos.feature_replay import SETTINGS, Replay, last_vectors, rows_committed, settled

pytestmark = [pytest.mark.servers, pytest.mark.timeout(420)]
HOME = Path(".causemesh-test-chaos-features")
SEED = int(os.environ.get("CHAOS_SEED") or random.randrange(2**32))
KILLS = int(os.environ.get("CHAOS_KILLS", "20"))


# More often, and the supervisor takes it for a service that can't start (five in 20 s), and stops.
_APART_S = 4.0


async def killed(mesh: FeatureMesh, rng: random.Random) -> None:
    """End features at a random moment, and wait until every partition was claimed and committed."""
    await asyncio.sleep(_APART_S + rng.random())
    before = {row.partition: row.epoch for row in await mesh.rows()}
    mesh.mesh.kill("features")

    async def at_work() -> bool:
        rows = await mesh.rows()
        claimed = [row for row in rows if row.epoch > before[row.partition]]
        return len(claimed) == PARTITIONS

    await until(at_work)
    at = {row.partition: row.committed_at for row in await mesh.rows()}

    async def committed() -> bool:
        return all(row.committed_at > at[row.partition] for row in await mesh.rows())

    await until(committed)


async def asked(mesh: FeatureMesh, view: str, entity: str, as_of_us: int) -> bytes | None:
    """The current vector by the admin API; None when the entity is forgotten."""

    def ask() -> dict[str, Any] | None:
        with mesh.mesh.client("features") as client:
            path = f"/v1/views/{view}/entities/{shown(entity)}"
            answer = client.get(path, params={"tenant_id": TENANT})
            if answer.status_code == 404:
                return None
            answer.raise_for_status()
            told: dict[str, Any] = answer.json()
            return told

    found = await asyncio.to_thread(ask)
    if found is None:
        return None
    assert found["as_of_us"] == as_of_us
    values = [np.nan if value is None else value for value in found["features"].values()]
    return np.array(values, "<f4").tobytes()


def files_of(home: Path) -> set[str]:
    """The checkpoint files that lie there, less the folder they lie in."""
    folder = home / "checkpoints"
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


async def check_files(mesh: FeatureMesh) -> None:
    """Every file that lies there is one that a manifest names, and the other way round."""

    async def equal() -> bool:
        named = {name for one in await mesh.manifests() for name in one.files}
        return named == files_of(mesh.home)

    await until(equal, 20)


async def check_altered_file(mesh: FeatureMesh) -> None:
    """A service does not start on a file that is not as it was written, and names it."""
    await asyncio.to_thread(mesh.mesh.down)
    (first, *_) = await mesh.manifests()
    name = sorted(first.files)[0]
    path = mesh.home / "checkpoints" / name
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    log = mesh.mesh.process("features").log
    before = (await mesh.rows())[0]

    async def refused() -> bool:
        return f"{name} under file://" in log.read_text()

    with suppress(Fatal):  # it may end before it was ready
        await asyncio.to_thread(mesh.mesh.up)
    await until(refused)
    await asyncio.to_thread(mesh.mesh.down)
    after = (await mesh.rows())[0]
    assert after.epoch > before.epoch
    assert after.committed_at == before.committed_at, "it went on, on something else"
    path.write_bytes(content)
    await asyncio.to_thread(mesh.mesh.up)


async def test_vectors_after_many_kills_are_those_of_a_clean_recomputation() -> None:
    rng = random.Random(SEED)
    print(f"\nCHAOS_SEED={SEED}: {KILLS} kills of features")
    async with opened(HOME, **SETTINGS) as mesh:
        replay = Replay(mesh, rng)
        await replay.span()
        await until(lambda: rows_committed(mesh))
        sending = asyncio.create_task(replay.run())
        for _ in range(KILLS):
            await killed(mesh, rng)
        replay.stop()
        await sending
        await replay.span()
        await settled(mesh, replay.until_us)

        recomputed = Recomputed(await mesh.log("events.reading"))
        vectors = await last_vectors(mesh, replay.until_us)
        differ = [
            (view, entity, sequence)
            for view, entity, sequence, vector in vectors
            if recomputed.vector(view, entity, sequence) != vector
        ]
        epochs = [row.epoch for row in await mesh.rows()]
        manifests = await mesh.manifests()
        print(
            f"  {replay.sent} events, {len(vectors)} vectors, epochs {epochs},"
            f" checkpoints {[one.sequence for one in manifests]}"
        )
        assert differ == []
        assert {(view, entity) for view, entity, _, _ in vectors} == recomputed.entities
        assert all(epoch > KILLS for epoch in epochs)

        held = 0
        for view, entity in sorted(recomputed.entities):
            found = await asked(mesh, view, entity, replay.until_us)
            if found is not None:  # else its tiles are out of every window
                held += 1
                want = recomputed.vector(view, entity, replay.until_us)
                assert found == want, (view, entity)
        assert held > len(recomputed.entities) // 2
        await check_files(mesh)
        await check_altered_file(mesh)
        await check_files(mesh)


def test_control_a_vector_that_misses_an_event_is_found() -> None:
    """The recomputation tells a lost or doubled event of any view."""
    rng = random.Random(1)
    rows = readings(rng, 0, HOUR_US, 0, 60).with_columns(
        pl.col("occurred_at").cast(pl.Int64).alias("occurred_at_us"),
        pl.lit(1, pl.Int64).alias("source"),
        pl.int_range(60, dtype=pl.Int64).alias("position"),
        pl.lit(3.5).alias("value"),
    )
    whole = Recomputed(rows)
    for other in (Recomputed(rows.slice(1)), Recomputed(pl.concat([rows, rows.slice(0, 1)]))):
        changed = {
            view
            for view, entity in other.entities
            if other.vector(view, entity, HOUR_US) != whole.vector(view, entity, HOUR_US)
        } | {view for view, _ in whole.entities - other.entities}
        assert {"sensors@v1", "sites@v1"} <= changed
    assert set(VIEWS) == {view for view, _ in whole.entities}
