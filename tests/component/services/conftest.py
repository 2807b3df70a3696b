"""Ingest, features and inference as processes of one mesh, and a test's own ends of its log."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx
import polars as pl
import pytest
from onnx import TensorProto, helper

from causemesh.bus.base import Outbound
from causemesh.bus.kafka import KafkaBus
from causemesh.catalogue import DEADLETTERS, Catalogue
from causemesh.client import Client
from causemesh.codec.columns import frame_schema
from causemesh.codec.decode import Decoder
from causemesh.codec.registry import HttpRegistry
from causemesh.codec.rows import RowEncoder
from causemesh.errors import Retryable
from causemesh.local import Cluster, Endpoints
from causemesh.local.mesh import Mesh
from causemesh.local.ports import choose_ports
from causemesh.log import LogReader, Span
from causemesh.settings import API_PORTS

ROOT = Path(__file__).parents[3]
PROJECT = ROOT / "tests" / "project"
REJECTS = "ingest.rejects.v1"
PREDICTIONS = "inference.predictions.v1"
TASKS = "inference.tasks.realtime.v1"
READINGS = "events.reading"
VECTORS = "features.vectors.v1"
VERSIONS = "models.versions.v1"
_READ = (REJECTS, PREDICTIONS, TASKS, READINGS, VECTORS, VERSIONS, DEADLETTERS)
Rows = Sequence[Mapping[str, Any]]


async def until(condition: Callable[[], Awaitable[Any]], timeout_s: float = 90) -> Any:
    """The first true answer of `condition`."""
    async with asyncio.timeout(timeout_s):
        while not (answer := await condition()):  # noqa: ASYNC110 - polls other processes
            await asyncio.sleep(0.1)
    return answer


class Outside:
    """What is outside the services: producers, readers of the log, people at the admin APIs."""

    def __init__(self, mesh: Mesh, cluster: Endpoints) -> None:
        self.mesh = mesh
        self.cluster = cluster
        self.catalogue = Catalogue.load([PROJECT])
        self.bus = KafkaBus(cluster.kafka_bootstrap)
        self.registry = HttpRegistry(cluster.registry_url)
        self.producer = self.bus.producer("test-outside")
        self.client = Client(self.catalogue, self.registry, self.producer)
        self.reader = LogReader(self.bus, self.catalogue, Decoder(self.registry))
        self.clients = {name: self._client(name) for name in mesh.services}
        self.before: dict[tuple[str, int], Span] = {}

    def _client(self, service: str) -> httpx.AsyncClient:
        headers = {"Authorization": f"Bearer {self.mesh.token}"}
        # It is plain HTTP: loading the certificates would take longer than the calls.
        return httpx.AsyncClient(
            base_url=self.mesh.url(service), headers=headers, timeout=30, verify=False
        )

    async def open(self) -> None:
        self.before = await self.reader.ends(_READ)

    async def close(self) -> None:
        for client in self.clients.values():
            await client.aclose()
        await self.producer.close()
        await self.registry.close()
        await self.bus.close()

    async def ask(self, service: str, method: str, path: str, **more: Any) -> httpx.Response:
        return await self.clients[service].request(method, f"/v1{path}", **more)

    async def done(self, service: str, method: str, path: str, **more: Any) -> Any:
        """The answer's body; the call must succeed."""
        answer = await self.ask(service, method, path, **more)
        assert answer.is_success, answer.text
        return answer.json()

    async def values(self, topic: str, rows: Rows) -> list[bytes]:
        """Rows as framed records of `topic`."""
        declared = self.catalogue.topic(topic)
        schema_id = await self.registry.register(declared.subject, declared.record)
        encoder = RowEncoder(declared.record, schema_id)
        return [encoder.encode(row) for row in rows]

    async def write(self, topic: str, values: Sequence[bytes], partition: int = 0) -> None:
        """Write records as one batch of the broker, whatever their bytes."""
        keys: list[bytes | None] = [b"k"] * len(values)
        await self.producer.send([Outbound(topic, partition, keys, list(values))])

    async def written(self, topic: str) -> pl.DataFrame:
        """The records of a topic since `open`, each partition in order, replays dropped."""
        now = await self.reader.ends([topic])
        spans = {source: Span(self.before[source].last, span.last) for source, span in now.items()}
        frames = [batch.frame async for batch in self.reader.read(spans)]
        if not frames:
            return pl.DataFrame(schema=frame_schema(self.catalogue.topic(topic).record))
        return pl.concat(frames)

    async def of(self, topic: str, tenant: str) -> pl.DataFrame:
        """The tenant's records since `open`."""
        return (await self.written(topic)).filter(pl.col("tenant_id") == tenant)

    async def eventually(self, topic: str, tenant: str, count: int) -> pl.DataFrame:
        """The tenant's records since `open`, once there are `count`."""
        return await self.eventually_where(topic, pl.col("tenant_id") == tenant, count)

    async def eventually_where(self, topic: str, which: pl.Expr, count: int = 1) -> pl.DataFrame:
        """The records since `open` that are meant, once there are `count`."""

        async def enough() -> list[pl.DataFrame]:
            found = (await self.written(topic)).filter(which)
            return [found] if found.height >= count else []

        (found,) = await until(enough)
        assert isinstance(found, pl.DataFrame)
        return found

    async def register(self, model: str, version: int, content: bytes, **ask: Any) -> None:
        """Upload an artefact, register it, and wait until every partition of features knows it."""
        digest = (await self.done("inference", "PUT", "/artefacts", content=content))["sha256"]
        body = {"version": version, "artefact_sha256": digest, **ask}
        await self.done("inference", "POST", f"/models/{model}/versions", json=body)
        await until(lambda: self._known(f"{model}@{version}"))

    async def _known(self, name: str) -> bool:
        partitions = await self.done("features", "GET", "/models")
        return len(partitions) == 4 and all(name in one["versions"] for one in partitions.values())


def reading(tenant: str, event_id: str, **more: Any) -> dict[str, Any]:
    """A good reading."""
    envelope = {"event_id": event_id, "tenant_id": tenant, "occurred_at": datetime.now(UTC)}
    return {**envelope, "sensor": f"{tenant}-s", "site": f"{tenant}-site", "value": 1.0, **more}


def request(tenant: str, request_id: str, model: str, **more: Any) -> dict[str, Any]:
    """A good request for version 1, about the tenant's sensor, as a row of inbox.requests."""
    envelope = {"event_id": request_id, "tenant_id": tenant, "occurred_at": datetime.now(UTC)}
    asked = {"model": model, "version": 1, "inputs": [{"name": "row", "value": 1.0}]}
    return {**envelope, **asked, "entities": [{"name": "sensor", "value": f"{tenant}-s"}], **more}


def onnx_model(nodes: Sequence[Any], width: int, **constants: Any) -> bytes:
    """An ONNX file from `x` [rows, width] to `score` [rows, 1]."""
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, width])],
        [helper.make_tensor_value_info("score", TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    opset = helper.make_opsetid("", 17)
    return bytes(helper.make_model(graph, opset_imports=[opset], ir_version=8).SerializeToString())


def total_model(width: int) -> bytes:
    """score = the sum of the row."""
    nodes = [helper.make_node("MatMul", ["x", "ones"], ["score"])]
    return onnx_model(nodes, width, ones=np.ones((width, 1), np.float32))


def lookup_model() -> bytes:
    """score = table[x0], [0, 0.25, 0.5, 0.75]; ONNX Runtime raises for an x0 outside it."""
    nodes = [
        helper.make_node("Cast", ["x"], ["row"], to=TensorProto.INT64),
        helper.make_node("Gather", ["table", "row"], ["score"], axis=0),
    ]
    return onnx_model(nodes, 1, table=np.linspace(0, 0.75, 4, dtype=np.float32))


@pytest.fixture(scope="session")
def home(cluster: Endpoints) -> Path:
    """The home folder of the session's servers."""
    return Path(cluster.triton_models).parents[1]


@pytest.fixture(scope="session")
def triton(home: Path) -> Iterator[Cluster]:
    """Triton on the home of the other servers."""
    server = Cluster(home, ("triton",))
    server.up()
    yield server
    server.down()


async def _create_topics(cluster: Endpoints) -> None:
    """Create every topic and wait until the broker tells of all of them."""
    catalogue = Catalogue.load([PROJECT])
    admin = KafkaBus(cluster.kafka_bootstrap).admin()
    await admin.ensure(list(catalogue.topics.values()))
    async with asyncio.timeout(90):
        while True:
            try:
                await admin.ends(list(catalogue.topics))
                break
            except Retryable as error:
                await asyncio.sleep(error.retry_after)
    await admin.close()


@pytest.fixture(scope="session")
def mesh(home: Path, cluster: Endpoints, triton: Cluster) -> Iterator[Mesh]:
    """Ingest, features and inference, supervised."""
    # Ports of the system's choice: another mesh on this machine has the default ones, now or later.
    choose_ports(home / "service-ports.json", dict.fromkeys(API_PORTS, 0))
    services = Mesh(home, cluster, PROJECT, ["ingest", "features", "inference"])
    # A member that joins its group while topics are being made is assigned none of them.
    asyncio.run(_create_topics(cluster))
    services.extra = {"CAUSEMESH_SLICE_SECONDS": "1", "CAUSEMESH_PUBLISH_SECONDS": "0.2"}
    try:
        services.up()
        yield services
    finally:
        services.down()


@asynccontextmanager
async def opened(mesh: Mesh, cluster: Endpoints) -> AsyncIterator[Outside]:
    made = Outside(mesh, cluster)
    try:
        await made.open()
        yield made
    finally:
        await made.close()


@pytest.fixture(scope="session")
def lookup(mesh: Mesh, cluster: Endpoints) -> str:
    """The name of a model with `lookup_model` as its version 1."""
    model = f"lookup-{uuid.uuid4().hex[:8]}"

    async def register() -> None:
        async with opened(mesh, cluster) as outside:
            inputs = ["input.row"]
            await outside.register(model, 1, lookup_model(), features=inputs, required=inputs)

    asyncio.run(register())
    return model


@pytest.fixture
async def outside(mesh: Mesh, cluster: Endpoints) -> AsyncIterator[Outside]:
    async with opened(mesh, cluster) as made:
        yield made


@pytest.fixture
def tenant() -> str:
    return f"t{uuid.uuid4().hex[:12]}"
