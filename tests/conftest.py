"""The servers that component tests need, started once a session and stopped at its end."""

from __future__ import annotations

import os
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import hypothesis
import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from causemesh.local import Cluster, Endpoints
from causemesh.migrations import metadata

# The suite judges a change by the same examples each time; `make hunt` looks for new ones.
# How long an example takes is a matter of what else the machine does.
hypothesis.settings.register_profile("same", derandomize=True, deadline=None)
hypothesis.settings.register_profile("hunt", print_blob=True, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

_HOME = Path(os.environ.get("CAUSEMESH_TEST_HOME", ".causemesh-test"))


@pytest.fixture(scope="session")
def cluster() -> Iterator[Endpoints]:
    """Kafka, the registry and Postgres."""
    servers = Cluster(_HOME)
    yield servers.up()
    servers.down()


@pytest.fixture(scope="session")
def pulsar() -> Iterator[Endpoints]:
    """Pulsar, for those tests alone that run on it."""
    servers = Cluster(_HOME, ["pulsar"])
    yield servers.up()
    servers.down()


@pytest.fixture(scope="session")
def kafka_bootstrap(cluster: Endpoints) -> str:
    return cluster.kafka_bootstrap


@pytest.fixture(scope="session")
def registry_url(cluster: Endpoints) -> str:
    return cluster.registry_url


@pytest.fixture
async def database(cluster: Endpoints) -> AsyncIterator[AsyncEngine]:
    """A fresh database with the kit's tables, dropped afterwards."""
    name = f"test_{uuid.uuid4().hex}"
    server = create_async_engine(cluster.database("postgres"), isolation_level="AUTOCOMMIT")
    async with server.connect() as connection:
        await connection.execute(sa.text(f"CREATE DATABASE {name}"))
    engine = create_async_engine(cluster.database(name))
    async with engine.begin() as connection:
        await connection.run_sync(metadata.create_all)
    yield engine
    await engine.dispose()
    async with server.connect() as connection:
        await connection.execute(sa.text(f"DROP DATABASE {name} WITH (FORCE)"))
    await server.dispose()
