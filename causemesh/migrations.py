"""Database migrations of one service (Alembic), under deploy/migrations/<service>.

usage: python -m causemesh.migrations <service> "what changes"   writes the next migration
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from sqlalchemy.engine import Connection
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from causemesh import outbox as _outbox  # noqa: F401 - its tables join the metadata
from causemesh import positions_sql as _positions  # noqa: F401 - its table joins the metadata
from causemesh.errors import Misdeclared
from causemesh.sql import database_errors, metadata

_ROOT = Path(__file__).resolve().parents[1] / "deploy" / "migrations"
_LOCK = 0x63617573656D  # any number that every instance agrees on


async def migrate(service: str, engine: AsyncEngine) -> None:
    """Bring the service's database to the newest version; instances that start together wait."""
    config = _config(service)
    async with database_errors(), engine.begin() as connection:
        await connection.execute(sa.text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
        await connection.run_sync(_upgrade, config)


def _config(service: str) -> Config:
    if not (_ROOT / service).is_dir():
        raise Misdeclared(f"{_ROOT / service} is missing; every service has its migrations there")
    config = Config()
    config.set_main_option("script_location", str(_ROOT))
    config.set_main_option("version_locations", str(_ROOT / service))
    config.set_main_option("path_separator", "os")
    return config


def _upgrade(connection: Connection, config: Config) -> None:
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def target(service: str) -> list[sa.MetaData]:
    """What the database should hold: the kit's tables and the service's, if it has a store."""
    name = f"services.{service}.store"
    if importlib.util.find_spec(name) is None:
        return [metadata]
    tables: Any = importlib.import_module(name)
    return [metadata, tables.metadata]


async def _write(service: str, message: str, server_url: str) -> None:
    """Compare a scratch database at the newest version with the code; write the difference."""
    (_ROOT / service).mkdir(parents=True, exist_ok=True)
    server = create_async_engine(f"{server_url}/postgres", isolation_level="AUTOCOMMIT")
    name = f"migration_{service}"
    async with server.connect() as connection:
        await connection.execute(sa.text(f"DROP DATABASE IF EXISTS {name}"))
        await connection.execute(sa.text(f"CREATE DATABASE {name}"))
    engine = create_async_engine(f"{server_url}/{name}")
    config = _config(service)
    config.attributes["target"] = target(service)
    number = len(list((_ROOT / service).glob("*.py"))) + 1

    def compare(connection: Connection) -> None:
        config.attributes["connection"] = connection
        if number > 1:
            command.upgrade(config, "head")
        head = "head" if number > 1 else "base"
        command.revision(
            config,
            message,
            autogenerate=True,
            head=head,
            rev_id=f"{service}_{number:04d}",
            version_path=str(_ROOT / service),
        )

    async with engine.begin() as connection:
        await connection.run_sync(compare)
    await engine.dispose()
    async with server.connect() as connection:
        await connection.execute(sa.text(f"DROP DATABASE {name} WITH (FORCE)"))
    await server.dispose()


if __name__ == "__main__":
    from causemesh.settings import ServiceSettings

    if len(sys.argv) != 3:
        sys.exit(__doc__)
    asyncio.run(_write(sys.argv[1], sys.argv[2], ServiceSettings().postgres_url))
