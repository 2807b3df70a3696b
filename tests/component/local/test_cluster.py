"""The embedded servers survive kill -9 and leave nothing behind."""

from __future__ import annotations

from pathlib import Path

import httpx
import psutil
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from causemesh.bus.base import BEFORE_FIRST, Outbound
from causemesh.bus.kafka import KafkaBus
from causemesh.catalogue import Catalogue
from causemesh.codec.registry import HttpRegistry
from causemesh.local import Cluster
from causemesh.local.cluster import SERVERS

pytestmark = pytest.mark.servers


@pytest.fixture
def open_folder(tmp_path: Path) -> Path:
    """A folder that Postgres can enter: it runs as an unprivileged user when the tests are root."""
    for folder in (tmp_path, *list(tmp_path.parents)[:2]):
        folder.chmod(0o755)
    return tmp_path


async def test_data_survives_a_crash_of_every_server(open_folder: Path) -> None:
    cluster = Cluster(open_folder)
    try:
        await _use_and_crash(cluster)
    finally:
        cluster.down()
    assert [status.pid for status in cluster.status()] == [None] * len(SERVERS)
    homed = [
        p for p in psutil.process_iter(["cmdline"]) if str(open_folder) in str(p.info["cmdline"])
    ]
    assert homed == []


async def _use_and_crash(cluster: Cluster) -> None:
    endpoints = cluster.up()
    bus = KafkaBus(endpoints.kafka_bootstrap)
    topic = Catalogue.load().topic("ingest.rejects.v1")
    admin = bus.admin()
    assert await admin.ensure([topic]) == [topic.name]
    await admin.close()
    producer = bus.producer("t")
    await producer.send([Outbound(topic.name, 0, [None], [b"kept"])])
    await producer.close()
    registry = HttpRegistry(endpoints.registry_url)
    schema_id = await registry.register("kept", topic.record)
    await _sql(endpoints.database("billing"), "CREATE TABLE kept AS SELECT 42 AS n")

    pids = {status.name: status.pid for status in cluster.status()}
    for name in SERVERS:
        cluster.kill(name)
    assert cluster.up() == endpoints
    assert all(status.pid != pids[status.name] for status in cluster.status())

    reader = bus.reader({(topic.name, 0): BEFORE_FIRST})
    batches = []
    while not batches:
        batches = await reader.fetch(10, 1.0)
    await reader.close()
    assert list(batches[0].values) == [b"kept"]
    again = HttpRegistry(endpoints.registry_url)
    assert await again.register("kept", topic.record) == schema_id
    await registry.close()
    await again.close()
    assert await _sql(endpoints.database("billing"), "SELECT n FROM kept") == 42


async def _sql(url: str, statement: str) -> int | None:
    engine = create_async_engine(url)
    async with engine.begin() as connection:
        result = await connection.execute(text(statement))
        value = result.scalar() if result.returns_rows else None
    await engine.dispose()
    return value


def test_a_second_up_reuses_what_runs(cluster: object) -> None:
    home = Path(".causemesh-test")
    before = {status.name: status.pid for status in Cluster(home).status()}
    Cluster(home).up()
    assert {status.name: status.pid for status in Cluster(home).status()} == before
    assert httpx.get(f"{Cluster(home).endpoints.registry_url}/subjects").status_code == 200
