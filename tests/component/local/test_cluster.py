"""The embedded servers survive kill -9 and leave nothing behind."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import psutil
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from causemesh.bus.base import BEFORE_FIRST, Outbound
from causemesh.bus.kafka import KafkaBus
from causemesh.bus.pulsar import PulsarBus
from causemesh.catalogue import Catalogue
from causemesh.codec.registry import HttpRegistry
from causemesh.local import Cluster, Endpoints
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


async def test_records_survive_a_crash_of_pulsar(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, ["pulsar"])
    try:
        endpoints = cluster.up()
        bus = PulsarBus(endpoints.pulsar_url, endpoints.pulsar_admin_url)
        topic = Catalogue.load().topic("ingest.rejects.v1")
        admin = bus.admin()
        assert await admin.ensure([topic]) == [topic.name]
        await _send(bus, topic.name, b"before")
        ends = await admin.ends([topic.name])
        cluster.kill("pulsar")
        assert cluster.up() == endpoints
        assert await admin.ensure([topic]) == []
        assert await admin.ends([topic.name]) == ends
        await _send(bus, topic.name, b"after")
        everything = await _first(bus, topic.name, BEFORE_FIRST, 2)
        assert everything == [b"before", b"after"]
        assert await _first(bus, topic.name, ends[(topic.name, 0)], 1) == [b"after"]
        await admin.close()
        await bus.close()
    finally:
        cluster.down()


async def _send(bus: PulsarBus, topic: str, value: bytes) -> None:
    producer = bus.producer("t")
    await producer.send([Outbound(topic, 0, [None], [value])])
    await producer.close()


async def _first(bus: PulsarBus, topic: str, after: int, count: int) -> list[bytes | None]:
    reader = bus.reader({(topic, 0): after})
    values: list[bytes | None] = []
    async with asyncio.timeout(60):
        while len(values) < count:
            for batch in await reader.fetch(10, 1.0):
                values += batch.values
    await reader.close()
    return values


async def _sql(url: str, statement: str) -> int | None:
    engine = create_async_engine(url)
    async with engine.begin() as connection:
        result = await connection.execute(text(statement))
        value = result.scalar() if result.returns_rows else None
    await engine.dispose()
    return value


def test_a_second_up_reuses_what_runs(cluster: Endpoints) -> None:
    home = Path(cluster.triton_models).parents[1]
    before = {status.name: status.pid for status in Cluster(home).status()}
    Cluster(home).up()
    assert {status.name: status.pid for status in Cluster(home).status()} == before
    assert httpx.get(f"{Cluster(home).endpoints.registry_url}/subjects").status_code == 200
