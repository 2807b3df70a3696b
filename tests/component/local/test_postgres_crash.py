"""Postgres is started again although sessions of the killed server are still ending."""

from __future__ import annotations

import asyncio
from pathlib import Path

import psutil
import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine

from causemesh.errors import Fatal
from causemesh.local import Cluster, servers

pytestmark = pytest.mark.servers


@pytest.mark.parametrize("patient", [True, False])
async def test_a_session_that_ends_late_does_not_keep_the_server_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, patient: bool
) -> None:
    """Postgres refuses to start while a process of the one before has its shared memory; the
    control arm starts it once."""
    if not patient:
        monkeypatch.setattr(servers, "_SESSIONS_END_S", 0.0)
    for folder in (tmp_path, *list(tmp_path.parents)[:2]):
        folder.chmod(0o755)
    cluster = Cluster(tmp_path / "home", ["postgres"])
    engine = create_async_engine(cluster.up().database("billing"))
    connection = await engine.connect()
    try:
        asked = await connection.execute(sa.text("SELECT pg_backend_pid()"))
        session = psutil.Process(asked.scalar_one())
        session.suspend()  # on a busy machine it need not have run since the kill
        cluster.kill("postgres")
        starting = asyncio.create_task(asyncio.to_thread(cluster.up))
        await asyncio.sleep(3.0)
        session.resume()
        if not patient:
            with pytest.raises(Fatal, match="pre-existing shared memory"):
                await starting
            return
        await starting
        async with engine.connect() as again:
            assert (await again.execute(sa.text("SELECT 1"))).scalar_one() == 1
    finally:
        await connection.invalidate()  # its session went with the old server
        await engine.dispose()
        cluster.down()
