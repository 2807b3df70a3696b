"""A mesh whose views stand on a transform: taps of visitors, brought together to sessions.

Ingest, features, the lake's writer and the transforms run as they ship, on servers of their own, in
replay mode: so what is answered does not hang on how fast anything was.
"""

from __future__ import annotations

import asyncio
import json
import random
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import polars as pl
import yaml

from causemesh.bus.base import Outbound
from causemesh.bus.kafka import KafkaBus
from causemesh.catalogue import LAKE, TRANSFORMS, Catalogue
from causemesh.client import Client
from causemesh.codec.decode import Decoder
from causemesh.codec.registry import HttpRegistry
from causemesh.codec.rows import RowEncoder
from causemesh.derived import Transform
from causemesh.local import Cluster
from causemesh.local.mesh import Mesh
from causemesh.local.ports import choose_ports
from causemesh.log import LogReader
from causemesh.runner.emitter import event_ids
from causemesh.settings import API_PORTS
from services.features.domain.parsing import parse_views
from services.features.plan import VERSIONS, event_frame, tasks_topic
from services.features.transforms.loading import Event, load_function

PARTITIONS = 2
TENANTS = ("acme", "brim")
MINUTE_US = 60_000_000
START_US = 1_356_998_400_000_000
SESSIONS, TAPS, TASKS = "events.session_closed", "events.tapped", tasks_topic("realtime")
PORTS = (
    *("kafka", "kafka_controller", "registry", "registry_management"),
    *("postgres", "triton", "triton_metrics", "stripe", "pulsar", "pulsar_web", "pulsar_bookie"),
)
CATALOGUE = {
    "requests": {"watermark": "source"},
    "event_types": {
        "tapped": {"record": "Tapped", "key": "tap_id", "watermark": "source", "about": "A tap."},
        "session_closed": {
            "record": "SessionClosed",
            "key": "visitor",
            "about": "A visitor came back after a while: the session before is over.",
            "transform": {"file": "transforms/sessions.py", "inputs": ["tapped"], "by": "visitor"},
        },
    },
}
TAPPED = [
    {"name": "tap_id", "type": "string"},
    {"name": "visitor", "type": ["null", "string"], "default": None},
    {"name": "page", "type": "string"},
    {"name": "spent", "type": "double"},
]
SESSION_CLOSED = [
    {"name": "visitor", "type": "string"},
    {"name": "number", "type": "int"},
    {"name": "page", "type": "string"},
    {"name": "taps", "type": "int"},
    {"name": "spent", "type": "double"},
    {"name": "closed_by", "type": "string"},
]
FUNCTION = '''
GAP_S = 15 * 60


async def session_closed(event, table):
    """A tap later than GAP_S after all before it closes their session and begins the next."""
    at_s, session = event.occurred_at.timestamp(), table.get("open")
    if session is not None and at_s - session["last_s"] > GAP_S:
        table["closed"] = table.get("closed", 0) + 1
        yield {
            "visitor": event["visitor"],
            "number": table["closed"],
            "page": session["page"],
            "taps": session["taps"],
            "spent": session["spent"],
            "closed_by": event["tap_id"],
        }
        session = None
    if session is None:
        session = {"page": event["page"], "taps": 0, "spent": 0.0, "last_s": at_s}
    table["open"] = {
        "page": session["page"],
        "taps": session["taps"] + 1,
        "spent": session["spent"] + event["spent"],
        "last_s": max(session["last_s"], at_s),
    }
'''
# one view of each placement, so that a transform's output is read in each of the ways
FEATURES = {
    "views": {
        "visits": {
            "event": "session_closed", "entity": "visitor", "tile": "10m", "retention": "6h",
            "windows": ["2h"],
            "features": {"*": ["count"], "spent": ["sum", "latest"], "taps": ["mean", "max"]},
        },
        "landings": {
            "event": "session_closed", "entity": "page", "placement": "rekeyed", "tile": "10m",
            "windows": ["1h"], "features": {"*": ["count"], "spent": ["mean", "last"]},
        },
        "everywhere": {
            "event": "session_closed", "entity": "page", "placement": "broadcast",
            "scope": "shared", "tile": "10m", "windows": ["3h"],
            "features": {"taps": ["sum", "distinct"]},
        },
    }
}  # fmt: skip
VIEWS = {view.id: view for view in parse_views(FEATURES)}
MODELS = {
    "of_visitor": ("visits", "everywhere"),
    "of_page": ("landings", "everywhere"),
}
"""By model the views that its versions ask for; a request's first entity is the first one's."""


async def until(condition: Callable[[], Awaitable[Any]], timeout_s: float = 90) -> Any:
    """The first true answer of `condition`, which reads whole topics."""
    async with asyncio.timeout(timeout_s):
        while not (answer := await condition()):  # noqa: ASYNC110 - polls other processes
            await asyncio.sleep(0.4)
    return answer


def features_of(model: str) -> list[str]:
    """The columns of a model's vectors."""
    return [name for one in MODELS[model] for name in VIEWS[f"{one}@v1"].feature_names]


def prepare(home: Path) -> Path:
    """An empty home, and the project in it."""
    shutil.rmtree(home, ignore_errors=True)
    folder = home / "project"
    for name in ("events", "transforms"):
        (folder / name).mkdir(parents=True)
    (folder / "catalogue.yaml").write_text(yaml.safe_dump(CATALOGUE, sort_keys=False))
    (folder / "features.yaml").write_text(yaml.safe_dump(FEATURES))
    (folder / "transforms" / "sessions.py").write_text(FUNCTION)
    for name, fields in {"Tapped": TAPPED, "SessionClosed": SESSION_CLOSED}.items():
        record = {"type": "record", "name": name, "namespace": "test", "fields": fields}
        (folder / "events" / f"{name}.avsc").write_text(json.dumps(record))
    choose_ports(home / "ports.json", dict.fromkeys(PORTS, 0))
    choose_ports(home / "service-ports.json", dict.fromkeys(API_PORTS, 0))
    return folder


class SessionsMesh:
    """The processes, and a test's own ends of them. `mesh` has all but the transforms' one, which
    a test runs and kills itself."""

    def __init__(self, home: Path, mesh: Mesh, cluster: Cluster) -> None:
        self.home = home
        self.mesh = mesh
        self.project = home / "project"
        self.catalogue = Catalogue.load([self.project], partitions=PARTITIONS)
        endpoints = cluster.endpoints
        self.bus = KafkaBus(endpoints.kafka_bootstrap)
        self.registry = HttpRegistry(endpoints.registry_url)
        self.producer = self.bus.producer("test-sessions")
        self.client = Client(self.catalogue, self.registry, self.producer)
        self.decoder = Decoder(self.registry)
        self.reader = LogReader(self.bus, self.catalogue, self.decoder)
        self._rng = random.Random(11)
        self._taps = self._asks = 0
        self.until_us = START_US
        self.requests: dict[str, dict[str, Any]] = {}

    @property
    def transform(self) -> Transform:
        """The declared transform."""
        return self.catalogue.transforms["session_closed"]

    def environment(self) -> dict[str, str]:
        """The settings of the transforms' process."""
        ports = json.loads((self.home / "service-ports.json").read_text())
        port = str(ports[TRANSFORMS])
        return {**self.mesh.environment(), "CAUSEMESH_API_PORT": port}

    async def close(self) -> None:
        await self.producer.close()
        await self.registry.close()
        await self.bus.close()

    async def register_models(self) -> None:
        """What inference would say of two models, and wait until features has heard it."""
        topic = self.catalogue.topic(VERSIONS)
        schema_id = await self.registry.register(topic.subject, topic.record)
        encoder = RowEncoder(topic.record, schema_id)
        values = []
        for number, model in enumerate(MODELS):
            cause = {"topic": "outbox.inference", "partition": 0, "position": number + 1}
            row = {
                "event_id": f"v-{model}",
                "tenant_id": "-",
                "occurred_at": START_US,
                "cause": {**cause, "index": 0, "origin": None},
                "model": model,
                "version": 1,
                "lane": "realtime",
                "features": features_of(model),
                "required": [],
                "artefact_sha256": "0" * 64,
                "label": None,
                "reference": [],
                "metrics": [],
                "sequence": number + 1,
            }
            values.append(encoder.encode(row))
        await self.producer.send([Outbound(topic.name, 0, [b"k"] * len(values), values)])

        async def known() -> bool:
            told = (await self.api("GET", "/models")).values()
            return len(told) == PARTITIONS and all(
                {f"{model}@1" for model in MODELS} <= set(one["versions"]) for one in told
            )

        await until(known)

    async def api(self, method: str, path: str, **more: Any) -> Any:
        """The answer of features' admin API; the call must succeed."""
        headers = {"Authorization": f"Bearer {self.mesh.token}"}
        url = self.mesh.url("features")
        async with httpx.AsyncClient(base_url=url, headers=headers, verify=False) as client:
            answer = await client.request(method, f"/v1{path}", **more)
        assert answer.is_success, answer.text
        return answer.json()

    async def span(self, taps: int = 80, asks: int = 12) -> None:
        """Half an hour: taps and requests of that time, then the watermarks behind them."""
        until_us = self.until_us + 30 * MINUTE_US
        times = sorted(self._rng.randrange(self.until_us, until_us) for _ in range(taps))
        await self.client.produce("tapped", [self._tap(at_us) for at_us in times])
        asked = [self._request(self._rng.randrange(self.until_us, until_us)) for _ in range(asks)]
        await self.client.request(asked)
        self.requests |= {row["event_id"]: row for row in asked}
        for kind in ("tapped", "requests"):
            await self.client.watermark(kind, until_us)
        self.until_us = until_us

    def _tap(self, at_us: int) -> dict[str, Any]:
        self._taps += 1
        visitor = self._rng.choice([*(f"v{n}" for n in range(30)), None])
        return {
            "event_id": f"tap{self._taps}",
            "tenant_id": self._rng.choice(TENANTS),
            "occurred_at": at_us,
            "tap_id": f"tap{self._taps}",
            "visitor": visitor,
            "page": f"p{self._rng.randrange(6)}",
            "spent": self._rng.randrange(400) / 4,
        }

    def _request(self, at_us: int) -> dict[str, Any]:
        self._asks += 1
        model = self._rng.choice(list(MODELS))
        visitor = {"name": "visitor", "value": f"v{self._rng.randrange(30)}"}
        page = {"name": "page", "value": f"p{self._rng.randrange(6)}"}
        return {
            "event_id": f"ask{self._asks}",
            "tenant_id": self._rng.choice(TENANTS),
            "occurred_at": at_us,
            "model": model,
            "version": 1,
            "entities": [visitor, page] if model == "of_visitor" else [page],
            "inputs": [],
            "mode": "replay",
            "expires_at": None,
        }

    async def log(self, topic: str) -> pl.DataFrame:
        """A topic's records with source and position, repeats dropped."""
        frames = [event_frame(b) async for b in self.reader.read(await self.reader.ends([topic]))]
        return pl.concat(frames) if frames else pl.DataFrame()

    async def raw(self, topic: str) -> pl.DataFrame:
        """Every record of a topic, what was sent twice too."""
        spans = await self.reader.ends([topic])
        left = {source: span.last for source, span in spans.items() if span.last >= 0}
        reader = self.bus.reader(dict.fromkeys(left, -1))
        record, frames = self.catalogue.topic(topic).record, []
        while left:
            for raw in await reader.fetch(20_000, 0.5):
                decoded = await self.decoder.decode(raw.values, record)
                frames.append(
                    decoded.frame.with_columns(
                        pl.col("occurred_at").cast(pl.Int64).alias("occurred_at_us"),
                        pl.lit(raw.partition, pl.Int64).alias("source"),
                        pl.Series("position", raw.positions[decoded.rows]),
                    )
                )
                source = (raw.topic, raw.partition)
                if source in left and int(raw.positions[-1]) >= left[source]:
                    del left[source]
        await reader.close()
        return pl.concat(frames) if frames else pl.DataFrame()

    async def sessions_by_the_log(self) -> dict[str, dict[str, Any]]:
        """What the function makes of the feed's log, by event id: the whole record."""
        function, feed = load_function(self.transform), self.transform.feed
        record = self.catalogue.topic(TAPS).record
        tables: dict[tuple[str, str], dict[str, Any]] = {}
        made: dict[str, dict[str, Any]] = {}
        fed = (await self.log(feed)).sort("source", "position")
        taps = (await self.decoder.decode(fed["value"].to_list(), record)).frame.to_dicts()
        for place, tap in zip(fed.select("source", "position").rows(), taps, strict=True):
            table = tables.setdefault((tap["tenant_id"], tap["visitor"]), {})
            event = Event("tapped", tap)
            outputs = [fields async for fields in function(event, table)]
            for index, fields in enumerate(outputs):
                (event_id,) = event_ids(SESSIONS, feed, place[0], [place[1]], [index])
                cause = {"topic": feed, "partition": place[0], "position": place[1]}
                made[event_id] = {
                    "event_id": event_id,
                    "tenant_id": tap["tenant_id"],
                    "occurred_at": event.occurred_at,
                    "cause": {**cause, "index": index, "origin": None},
                    **fields,
                }
        return made


@asynccontextmanager
async def opened(home: Path) -> AsyncIterator[SessionsMesh]:
    """Fresh servers and services under `home`; stopped at the end."""
    folder = prepare(home)
    cluster = Cluster(home)
    endpoints = await asyncio.to_thread(cluster.up)
    mesh = Mesh(home, endpoints, folder, ["ingest", "features", LAKE])
    mesh.extra = {
        "CAUSEMESH_PARTITIONS": str(PARTITIONS),
        "CAUSEMESH_TRANSFORMS_BATCH": "25",
        "CAUSEMESH_LAKE_COMMIT_SECONDS": "1",
        "CAUSEMESH_LAKE_UPKEEP_SECONDS": "0",
    }
    made = SessionsMesh(home, mesh, cluster)
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
