"""Every service's migrations build what its code says, on an empty database."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy.engine import Connection
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from causemesh.catalogue import SERVICES
from causemesh.errors import Misdeclared
from causemesh.local import Endpoints
from causemesh.migrations import migrate, target

pytestmark = pytest.mark.servers
FOLDER = Path(__file__).parents[3] / "deploy" / "migrations"
MIGRATED = sorted(path.name for path in FOLDER.iterdir() if any(path.glob("*.py")))


@pytest.fixture
async def empty(cluster: Endpoints) -> AsyncIterator[AsyncEngine]:
    """A database with nothing in it, dropped afterwards."""
    name = f"test_{uuid.uuid4().hex}"
    server = create_async_engine(cluster.database("postgres"), isolation_level="AUTOCOMMIT")
    async with server.connect() as connection:
        await connection.execute(sa.text(f"CREATE DATABASE {name}"))
    engine = create_async_engine(cluster.database(name))
    yield engine
    await engine.dispose()
    async with server.connect() as connection:
        await connection.execute(sa.text(f"DROP DATABASE {name} WITH (FORCE)"))
    await server.dispose()


async def differences(engine: AsyncEngine, service: str) -> list[Any]:
    """What alembic would write as the next migration."""

    def compare(connection: Connection) -> list[Any]:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        wanted: Any = target(service)
        return list(compare_metadata(context, wanted))

    async with engine.connect() as connection:
        return await connection.run_sync(compare)


def test_every_service_folder_is_that_of_a_service() -> None:
    assert set(MIGRATED) <= set(SERVICES)
    assert MIGRATED


@pytest.mark.parametrize("service", MIGRATED)
async def test_the_migrated_database_is_what_the_code_says(
    service: str, empty: AsyncEngine
) -> None:
    await asyncio.gather(*(migrate(service, empty) for _ in range(3)))  # as instances start
    assert await differences(empty, service) == []


@pytest.mark.parametrize(
    ("change", "noticed"),
    [
        ("ALTER TABLE checkpoints DROP COLUMN state", "add_column"),
        ("ALTER TABLE checkpoints ALTER epoch TYPE text", "modify_type"),
        ("ALTER TABLE outbox_rows ALTER record DROP NOT NULL", "modify_nullable"),
        ("CREATE TABLE stray (n int)", "remove_table"),
        ("DROP TABLE outbox_heads", "add_table"),
    ],
)
async def test_a_database_that_drifted_is_noticed(
    change: str, noticed: str, empty: AsyncEngine
) -> None:
    await migrate("ingest", empty)
    async with empty.begin() as connection:
        await connection.execute(sa.text(change))
    assert noticed in str(await differences(empty, "ingest"))


async def test_a_service_without_migrations_is_refused(empty: AsyncEngine) -> None:
    with pytest.raises(Misdeclared, match="every service has its migrations there"):
        await migrate("nobody", empty)
