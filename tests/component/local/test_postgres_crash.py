"""Postgres is started again although sessions of the killed server are still ending."""

from __future__ import annotations

import asyncio
from pathlib import Path

import psutil
import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine

from causemesh.local import Cluster

pytestmark = pytest.mark.servers


async def test_a_session_that_ends_late_does_not_keep_the_server_away(tmp_path: Path) -> None:
    """Postgres refuses to start while a process of the one before has its shared memory."""
    for folder in (tmp_path, *list(tmp_path.parents)[:2]):
        folder.chmod(0o755)
    cluster = Cluster(tmp_path / "home", ["postgres"])
    engine = create_async_engine(cluster.up().database("billing"))
    try:
        async with engine.connect() as connection:
            asked = await connection.execute(sa.text("SELECT pg_backend_pid()"))
            session = psutil.Process(asked.scalar_one())
            session.suspend()  # on a busy machine it need not have run since the kill
            cluster.kill("postgres")
            starting = asyncio.create_task(asyncio.to_thread(cluster.up))
            await asyncio.sleep(3.0)
            session.resume()
            await starting
    finally:
        await engine.dispose()
        cluster.down()
