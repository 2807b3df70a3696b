"""A topic full of sensor readings on an embedded cluster: what features and billing are fed."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine

from causemesh.bus.base import Outbound
from causemesh.bus.kafka import KafkaBus
from causemesh.catalogue import WATERMARK, Catalogue
from causemesh.cli.running import settings_on
from causemesh.codec.encode import RegistryEncoders
from causemesh.codec.registry import HttpRegistry
from causemesh.local import Cluster, Endpoints
from causemesh.local.mesh import Mesh
from causemesh.local.ports import choose_ports
from causemesh.provision import provision
from causemesh.settings import API_PORTS

PROJECT = Path(__file__).parent / "project"
READINGS = "events.reading"
_REQUESTS = "inference.requests.v1"
_UNIT = 5_000  # records behind each watermark, as the door writes them under load
START_US = 1_767_225_600_000_000  # 2026-01-01, the start of an hour
HOUR_US = 3_600_000_000
_PORTS = (
    *("kafka", "kafka_controller", "registry", "registry_management"),
    *("postgres", "triton", "triton_metrics", "stripe"),
)
_ROUNDS_TO = 1 / 1024  # values are multiples of it, so that sums are exact in any order


@dataclass(frozen=True)
class Filled:
    """What lies in the topic: readings with these values in this order, and watermarks.

    `controls` is the number of watermarks; `schema_id` is that of the readings in the registry.
    """

    values: npt.NDArray[np.float64]
    controls: int
    schema_id: int

    @property
    def count(self) -> int:
        """Readings."""
        return len(self.values)

    @property
    def in_log(self) -> int:
        """Records in the partition, watermarks too."""
        return self.count + self.controls

    def total(self, count: int | None = None) -> float:
        """The sum of the first `count` values, exact."""
        return float(self.values[:count].sum())


class Place:
    """One cluster of Kafka, registry and Postgres, with one partition a topic."""

    def __init__(self, home: Path, endpoints: Endpoints, project: Path = PROJECT) -> None:
        self.home = home
        self.endpoints = endpoints
        self.catalogue = Catalogue.load([project], partitions=1)
        self._mesh = Mesh(home, endpoints, project, ["features", "billing"])
        self._api_port = json.loads((home / "service-ports.json").read_text())["features"]

    def environment(self) -> dict[str, str]:
        """The settings of a service on this cluster; one at a time, as they share a port."""
        return {
            **self._mesh.environment(),
            "CAUSEMESH_API_PORT": str(self._api_port),
            "CAUSEMESH_PARTITIONS": "1",
            "POLARS_MAX_THREADS": "1",
        }

    def schema_file(self) -> Path:
        """The readings' schema, for peers."""
        kept = self.home / "reading.avsc"
        kept.write_text(json.dumps(self.catalogue.topic(READINGS).record))
        return kept

    async def sql(self, database: str, statement: str) -> list[Any]:
        """Run a statement in one of the services' databases."""
        engine = create_async_engine(
            self.endpoints.database(database), isolation_level="AUTOCOMMIT"
        )
        try:
            async with engine.connect() as connection:
                found = await connection.execute(sa.text(statement))
                return list(found) if found.returns_rows else []
        finally:
            await engine.dispose()

    async def fresh_database(self, service: str) -> None:
        """Forget what a service has done."""
        await self.sql("postgres", f"DROP DATABASE IF EXISTS {service} WITH (FORCE)")
        await self.sql("postgres", f"CREATE DATABASE {service}")

    async def fill(self, count: int, sensors: int, hours: int = 1) -> Filled:
        """Write `count` readings, their watermarks, and the promise that no request will come."""
        bus = KafkaBus(self.endpoints.kafka_bootstrap)
        registry = HttpRegistry(self.endpoints.registry_url)
        producer = bus.producer("benchmark")
        topic = self.catalogue.topic(READINGS)
        encoders = RegistryEncoders(registry)
        encoder = await encoders.encoder(topic.subject, topic.record)
        promises = await encoders.encoder(WATERMARK, self.catalogue.controls[WATERMARK])
        values: list[npt.NDArray[np.float64]] = []
        end_us = START_US + hours * HOUR_US
        try:
            for frame in frames(count, sensors, hours):
                keys = [key.encode() for key in frame["sensor"].to_list()]
                await producer.send([Outbound(topic.name, 0, keys, encoder.encode(frame))])
                values.append(frame["value"].to_numpy())
                until_us = int(frame["occurred_at"].to_physical()[-1])
                if frame["cause"].struct.field("position")[-1] == count - 1:
                    until_us = end_us
                promise = promises.encode(_promise("inbox.reading", until_us))
                await producer.send([Outbound(topic.name, 0, [None], promise)])
            never_again = promises.encode(_promise("inbox.requests", end_us))
            await producer.send([Outbound(_REQUESTS, 0, [None], never_again)])
            schema_id = await registry.register(topic.subject, topic.record)
        finally:
            await producer.close()
            await registry.close()
            await bus.close()
        return Filled(np.concatenate(values), len(values), schema_id)


def frames(count: int, sensors: int, hours: int = 1) -> Iterator[pl.DataFrame]:
    """Readings of some hours in event time order, sensors drawn evenly, as the door passes them."""
    rng = np.random.default_rng(1)
    for start in range(0, count, _UNIT):
        numbers = np.arange(start, min(start + _UNIT, count))
        drawn = rng.integers(0, sensors, len(numbers))
        yield pl.DataFrame(
            {
                "event_id": [f"00000000-0000-5000-8000-{number:012d}" for number in numbers],
                "tenant_id": pl.Series(drawn % 100).cast(pl.String),
                "occurred_at": pl.Series(START_US + numbers * (hours * HOUR_US - 1) // count).cast(
                    pl.Datetime("us", "UTC")
                ),
                "cause": [
                    {
                        "topic": "inbox.reading",
                        "partition": 0,
                        "position": int(number),
                        "index": 0,
                        "origin": None,
                    }
                    for number in numbers
                ],
                "sensor": pl.Series(drawn).cast(pl.String),
                "value": rng.integers(0, 102_400, len(numbers)) * _ROUNDS_TO,
            }
        )


def _promise(source: str, at_us: int) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "source_topic": [source],
            "source_partition": pl.Series([0], dtype=pl.Int32),
            "watermark_at": pl.Series([at_us]).cast(pl.Datetime("us", "UTC")),
        }
    )


def own_ports(home: Path) -> None:
    """Ports of the system's choice: another mesh on this machine may take the default ones."""
    home.mkdir(parents=True, exist_ok=True)
    choose_ports(home / "ports.json", dict.fromkeys(_PORTS, 0))
    choose_ports(home / "service-ports.json", dict.fromkeys(API_PORTS, 0))


@contextmanager
def place(
    home: Path,
    servers: tuple[str, ...] = ("kafka", "registry", "postgres"),
    project: Path = PROJECT,
) -> Iterator[Place]:
    """A cluster with empty topics, stopped at the end."""
    shutil.rmtree(home, ignore_errors=True)
    own_ports(home)
    cluster = Cluster(home, servers)
    endpoints = cluster.up()
    try:
        asyncio.run(provision(settings_on(endpoints, project, "kafka", 1)))
        yield Place(home.resolve(), endpoints, project)
    finally:
        cluster.down()
