"""A mesh of ingest and features alone, and what its vectors must be by the log of its events."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import sqlalchemy as sa
import yaml
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from causemesh.bus.kafka import KafkaBus
from causemesh.catalogue import Catalogue
from causemesh.checkpoints.manifest import Manifest, is_manifest
from causemesh.client import Client
from causemesh.codec.decode import Decoder
from causemesh.codec.registry import HttpRegistry
from causemesh.local import Cluster
from causemesh.local.mesh import Mesh
from causemesh.log import LogReader
from services.features.domain.definitions import FeatureView
from services.features.domain.events import NULL, SEPARATOR, read_events
from services.features.domain.parsing import parse_views
from services.features.plan import event_frame
from tests.unit.features.reference import Event, expected

PARTITIONS = 2
VECTORS = "features.vectors.v1"
EVENTS = "events.reading"
TENANT = "t"
HOUR_US = 3_600_000_000
CATALOGUE = {
    "requests": {"watermark": "source"},
    "event_types": {
        "reading": {
            "record": "Reading", "key": "sensor", "watermark": "source", "about": "A reading.",
        },
    },
}  # fmt: skip
RECORD = {
    "type": "record", "name": "Reading", "namespace": "chaos", "doc": "A sensor's reading.",
    "fields": [
        {"name": "sensor", "type": "string"},
        {"name": "tag", "type": "string"},
        {"name": "site", "type": "string"},
        {"name": "value", "type": ["null", "double"], "default": None},
    ],
}  # fmt: skip
FEATURES = {
    "views": {
        "sensors": {
            "event": "reading", "entity": "sensor", "tile": "10m", "retention": "6h",
            "windows": ["1h", "3h"],
            "features": {
                "*": ["count", "age", "count session:20m:2h"],
                "value": ["sum", "mean", "std", "min", "max", "first", "last", "latest"],
            },
        },
        "tags": {
            "event": "reading", "entity": "tag", "placement": "rekeyed", "tile": "10m",
            "windows": ["2h"], "features": {"value": ["mean", "max", "distinct", "p50", "top1"]},
        },
        "sites": {
            "event": "reading", "entity": "site", "placement": "broadcast", "scope": "shared",
            "tile": "30m", "windows": ["4h"], "features": {"*": ["count"], "value": ["std"]},
        },
    }
}  # fmt: skip
VIEWS = {view.id: view for view in parse_views(FEATURES)}


def prepare(home: Path) -> None:
    """An empty home with the project's files."""
    shutil.rmtree(home, ignore_errors=True)
    folder = home / "project"
    (folder / "events").mkdir(parents=True)
    (folder / "catalogue.yaml").write_text(yaml.safe_dump(CATALOGUE))
    (folder / "features.yaml").write_text(yaml.safe_dump(FEATURES))
    (folder / "events" / "Reading.avsc").write_text(json.dumps(RECORD))


class FeatureMesh:
    """The processes, and a test's own ends of them."""

    def __init__(self, home: Path, mesh: Mesh, cluster: Cluster) -> None:
        self.home = home
        self.mesh = mesh
        self.catalogue = Catalogue.load([home / "project"], partitions=PARTITIONS)
        endpoints = cluster.endpoints
        self.bus = KafkaBus(endpoints.kafka_bootstrap)
        self.registry = HttpRegistry(endpoints.registry_url)
        self.producer = self.bus.producer("chaos-features")
        self.client = Client(self.catalogue, self.registry, self.producer)
        self.reader = LogReader(self.bus, self.catalogue, Decoder(self.registry))
        self.database: AsyncEngine = create_async_engine(endpoints.database("features"))

    async def close(self) -> None:
        await self.producer.close()
        await self.registry.close()
        await self.bus.close()
        await self.database.dispose()

    async def send(self, rows: pl.DataFrame, until_us: int) -> None:
        """Events, and the watermark behind them."""
        if rows.height:
            await self.client.produce("reading", rows)
        for kind in ("reading", "requests"):
            await self.client.watermark(kind, until_us)

    async def rows(self) -> list[Any]:
        """The checkpoints of the joining stage."""
        statement = sa.text(
            "SELECT partition, epoch, watermark_us, state, committed_at FROM checkpoints"
            " WHERE group_name = 'features' AND progress IS NOT NULL ORDER BY partition"
        )
        async with self.database.connect() as connection:
            return list((await connection.execute(statement)).all())

    async def manifests(self) -> list[Manifest]:
        """What the rows hold; none of them may hold a state itself."""
        rows = await self.rows()
        assert len(rows) == PARTITIONS
        assert all(is_manifest(row.state) for row in rows)
        return [Manifest.parse(row.state) for row in rows]

    async def log(self, topic: str) -> pl.DataFrame:
        """A topic's records with source and position, repeats dropped where they have marks."""
        spans = await self.reader.ends([topic])
        frames = [event_frame(batch) async for batch in self.reader.read(spans)]
        return pl.concat(frames)


async def until(condition: Callable[[], Awaitable[Any]], timeout_s: float = 60) -> Any:
    """The first true answer of `condition`."""
    async with asyncio.timeout(timeout_s):
        while not (answer := await condition()):  # noqa: ASYNC110 - polls other processes
            await asyncio.sleep(0.05)
    return answer


@asynccontextmanager
async def opened(
    home: Path, services: Sequence[str] = ("ingest", "features"), **settings: str
) -> AsyncIterator[FeatureMesh]:
    """Fresh servers and services under `home`; stopped at the end."""
    prepare(home)
    cluster = Cluster(home)
    endpoints = await asyncio.to_thread(cluster.up)
    mesh = Mesh(home, endpoints, home / "project", services)
    mesh.extra = {"CAUSEMESH_PARTITIONS": str(PARTITIONS), **settings}
    made = FeatureMesh(home, mesh, cluster)
    try:
        admin = made.bus.admin()
        await admin.ensure(list(made.catalogue.topics.values()))
        await admin.close()
        await asyncio.to_thread(mesh.up)
        yield made
    finally:
        await made.close()
        await asyncio.to_thread(mesh.down)
        await asyncio.to_thread(cluster.down)


def readings(rng: random.Random, from_us: int, until_us: int, first: int, count: int) -> Any:
    """Random events of a span of event time, in the form of the inbox."""
    sensors = [f"s{rng.randrange(300)}" for _ in range(count)]
    times = sorted(rng.randrange(from_us, until_us) for _ in range(count))
    values = [rng.choice([None, round(rng.gauss(20, 5), 2), 1.0]) for _ in range(count)]
    return pl.DataFrame(
        {
            "event_id": [f"e{first + n}" for n in range(count)],
            "tenant_id": [TENANT] * count,
            "occurred_at": pl.Series(times).cast(pl.Datetime("us", "UTC")),
            "sensor": sensors,
            "tag": [f"g{rng.randrange(60)}" for _ in range(count)],
            "site": [f"w{rng.randrange(8)}" for _ in range(count)],
            "value": pl.Series(values, dtype=pl.Float64),
        }
    )


class Recomputed:
    """The vectors by the events' log alone, one entity and one instant after another.

    All views are of the one event type whose log `events` is.
    """

    def __init__(self, events: pl.DataFrame, views: Mapping[str, FeatureView] = VIEWS) -> None:
        self._views = views
        self._events = {
            (view.id, entity): found
            for view in views.values()
            for entity, found in _by_entity(view, events)
        }

    @property
    def entities(self) -> set[tuple[str, str]]:
        """All (view, entity)."""
        return set(self._events)

    def vector(self, view: str, entity: str, as_of_us: int) -> bytes:
        """As it must have been published."""
        declared = self._views[view]
        # no answer looks further back; the plain recomputation is quadratic in the events
        reach_us = 2 * max(declared.tiles * declared.tile_us, declared.retention_us or 0)
        events = [
            event
            for event in self._events[view, entity]
            if as_of_us - reach_us <= event.occurred_at_us < as_of_us
        ]
        return np.array(expected(declared, events, entity, as_of_us), "<f4").tobytes()


def _by_entity(view: FeatureView, events: pl.DataFrame) -> Iterator[tuple[str, list[Event]]]:
    read = read_events(view, events)
    values = np.where(read.values == NULL, np.nan, read.values * view.resolution)
    rows: dict[str, list[Event]] = {}
    for at, entity in enumerate(read.entity.to_list()):
        inputs = tuple(None if np.isnan(value) else float(value) for value in values[:, at])
        event = Event(
            entity,
            int(read.occurred_at_us[at]),
            int(read.source[at]),
            int(read.position[at]),
            inputs,
        )
        rows.setdefault(entity, []).append(event)
    return iter(rows.items())


def shown(key: str) -> str:
    """An entity as it is asked for."""
    return key.rsplit(SEPARATOR, maxsplit=1)[-1]
