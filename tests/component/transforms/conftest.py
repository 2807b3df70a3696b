"""A project with a transform, its process, and a test's own ends of its log."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import socket
import sys
import uuid
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from causemesh.bus.base import Outbound
from causemesh.bus.kafka import KafkaBus
from causemesh.catalogue import DEADLETTERS, WATERMARK, Catalogue
from causemesh.codec.decode import Decoder
from causemesh.codec.registry import HttpRegistry
from causemesh.codec.rows import RowEncoder
from causemesh.errors import Retryable
from causemesh.local import Endpoints
from causemesh.log import LogReader
from causemesh.runner.emitter import event_ids

ROOT = Path(__file__).parents[3]
PARTITIONS = 2
TOKEN = "a-token-for-the-transforms"
FUNCTION = """
import hashlib


async def counted(event, table):
    if event["amount"] < 0:
        table["broken"] = True
        raise ValueError("a negative amount")
    table["n"] = table.get("n", 0) + 1
    table["total"] = table.get("total", 0) + event["amount"]
    told = table.get("chain", "") + event["event_id"]
    table["chain"] = hashlib.sha256(told.encode()).hexdigest()
    yield {"who": event["who"], "n": table["n"], "total": table["total"], "chain": table["chain"]}
"""
STEP = [
    {"name": "step_id", "type": "string"},
    {"name": "who", "type": ["null", "string"], "default": None},
    {"name": "amount", "type": "long"},
]
COUNTED = [
    {"name": "who", "type": "string"},
    {"name": "n", "type": "int"},
    {"name": "total", "type": "long"},
    {"name": "chain", "type": "string"},
]


def avsc(name: str, fields: Any) -> str:
    return json.dumps({"type": "record", "name": name, "namespace": "test", "fields": fields})


@dataclass
class Said:
    """What a transform should have said: outputs by id, tables by key, and who failed."""

    outputs: dict[str, tuple[Any, ...]]
    tables: dict[str, dict[str, Any]]
    failed: set[tuple[int, int]]


class World:
    """One project's transform and its topics."""

    def __init__(self, cluster: Endpoints, folder: Path) -> None:
        self.cluster = cluster
        self.folder = folder
        mark = uuid.uuid4().hex[:8]
        self.step, self.out = f"step_{mark}", f"counted_{mark}"
        self.environment = {
            **os.environ,
            **cluster.environment(),
            "CAUSEMESH_PROJECT": str(folder),
            "CAUSEMESH_API_TOKEN": TOKEN,
            "CAUSEMESH_SESSION_TIMEOUT_MS": "3000",
            "CAUSEMESH_TRANSFORMS_BATCH": "40",
            "POLARS_MAX_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
        }
        self._write_project()
        self.catalogue = Catalogue.load([folder])
        self.transform = self.catalogue.transforms[self.out]
        self.bus = KafkaBus(cluster.kafka_bootstrap)
        self.registry = HttpRegistry(cluster.registry_url)
        self.producer = self.bus.producer("test-outside")
        self.reader = LogReader(self.bus, self.catalogue, Decoder(self.registry))
        self.sent = 0

    def _write_project(self) -> None:
        transform = {"file": "transforms/counting.py", "function": "counted"}
        transform |= {"inputs": [self.step], "by": "who", "scope": "shared"}  # type: ignore[dict-item]
        types = {
            self.step: {"record": "Step", "key": "step_id", "partitions": PARTITIONS},
            self.out: {
                "record": "Counted",
                "key": "who",
                "partitions": PARTITIONS,
                "transform": transform,
            },
        }
        for name in ("events", "transforms"):
            (self.folder / name).mkdir(parents=True)
        (self.folder / "catalogue.yaml").write_text(json.dumps({"event_types": types}))
        (self.folder / "events" / "Step.avsc").write_text(avsc("Step", STEP))
        (self.folder / "events" / "Counted.avsc").write_text(avsc("Counted", COUNTED))
        (self.folder / "transforms" / "counting.py").write_text(FUNCTION)

    async def open(self) -> None:
        admin = self.bus.admin()
        topics = [
            *(self.transform.sources),
            self.transform.feed,
            self.transform.state,
            self.transform.output,
            DEADLETTERS,
        ]
        await admin.ensure([self.catalogue.topic(name) for name in topics])
        async with asyncio.timeout(60):
            while True:
                try:
                    await admin.ends(topics)
                    break
                except Retryable as error:
                    await asyncio.sleep(error.retry_after)
        await admin.close()

    async def close(self) -> None:
        await self.producer.close()
        await self.registry.close()
        await self.bus.close()

    async def encoder(self, topic: str) -> RowEncoder:
        declared = self.catalogue.topic(topic)
        return RowEncoder(
            declared.record, await self.registry.register(declared.subject, declared.record)
        )

    async def produce(self, steps: Sequence[tuple[str | None, int]], repeat: int = 0) -> None:
        """Steps (who, amount) as `ingest` writes them, in turn on each partition; the last
        `repeat` of each partition twice, as after a crash of it."""
        encoder = await self.encoder(f"events.{self.step}")
        values: dict[int, list[bytes]] = defaultdict(list)
        for who, amount in steps:
            number, self.sent = self.sent, self.sent + 1
            partition = number % PARTITIONS
            cause = {"topic": f"inbox.{self.step}", "partition": partition, "position": number}
            row = {
                "event_id": f"s{number}",
                "tenant_id": "t",
                "occurred_at": 1_356_998_400_000_000 + number * 1_000_000,
                "cause": {**cause, "index": 0, "origin": None},
                "step_id": f"s{number}",
                "who": who,
                "amount": amount,
            }
            values[partition].append(encoder.encode(row))
        await self.producer.send(
            [
                Outbound(f"events.{self.step}", partition, [b"k"] * len(all_), all_)
                for partition, ours in values.items()
                if (all_ := [*ours, *(ours[-repeat:] if repeat else [])])
            ]
        )

    async def promise(self, at_us: int) -> None:
        """`ingest`'s watermark about each of its inboxes' partitions, on every partition."""
        schema = self.catalogue.controls[WATERMARK]
        encoder = RowEncoder(schema, await self.registry.register(WATERMARK, schema))
        rows = [
            {"source_topic": f"inbox.{self.step}", "source_partition": n, "watermark_at": at_us}
            for n in range(PARTITIONS)
        ]
        values = [encoder.encode(row) for row in rows]
        topic = f"events.{self.step}"
        await self.producer.send(
            [Outbound(topic, n, [None] * len(values), values) for n in range(PARTITIONS)]
        )

    async def records(self, topic: str) -> list[tuple[int, int, dict[str, Any]]]:
        """The records of a topic (partition, position, fields), replays dropped."""
        found = []
        async for batch in self.reader.read(await self.reader.ends([topic])):
            rows = zip(batch.positions.tolist(), batch.frame.to_dicts(), strict=True)
            found += [(batch.partition, position, row) for position, row in rows]
        return sorted(found, key=lambda one: one[:2])

    async def raw(self, topic: str) -> list[tuple[int, bytes | None, dict[str, Any]]]:
        """Every record of a topic (partition, key, fields), what was sent twice too."""
        found = []
        ends = await self.reader.ends([topic])
        left = {source: span.last for source, span in ends.items() if span.last >= 0}
        reader = self.bus.reader(dict.fromkeys(left, -1))
        decoder, record = Decoder(self.registry), self.catalogue.topic(topic).record
        while left:
            for raw in await reader.fetch(20_000, 0.5):
                decoded = await decoder.decode(raw.values, record)
                rows = zip(decoded.rows.tolist(), decoded.frame.to_dicts(), strict=True)
                found += [(raw.partition, raw.keys[at], row) for at, row in rows]
                source = (raw.topic, raw.partition)
                if source in left and int(raw.positions[-1]) >= left[source]:
                    del left[source]
        await reader.close()
        return found

    async def stored(self) -> dict[bytes, dict[str, Any]]:
        """The rows of the changelog: the highest sequence of each key."""
        newest: dict[bytes, dict[str, Any]] = {}
        for _, key, row in await self.raw(self.transform.state):
            assert key is not None
            if key not in newest or row["sequence"] >= newest[key]["sequence"]:
                newest[key] = row
        return newest

    async def tables(self) -> dict[str, dict[str, Any]]:
        """The stored tables."""
        return {
            key[1:].decode(): json.loads(row["value"] or "{}")
            for key, row in (await self.stored()).items()
            if key.startswith(b"s")
        }

    async def expected(self) -> Said:
        """The function over the feed as it lies in the log, once for each cause."""
        said = Said({}, defaultdict(dict), set())
        steps = {row["event_id"]: row for _, _, row in await self.records(f"events.{self.step}")}
        decoder = Decoder(self.registry)
        record = self.catalogue.topic(f"events.{self.step}").record
        feed = self.transform.feed
        for partition, position, row in await self.records(feed):
            fields = (await decoder.decode([row["value"]], record)).frame.to_dicts()[0]
            assert fields == steps[fields["event_id"]]
            table = said.tables[fields["who"]]
            if fields["amount"] < 0:
                said.failed.add((partition, position))
                continue
            table["n"] = table.get("n", 0) + 1
            table["total"] = table.get("total", 0) + fields["amount"]
            told = table.get("chain", "") + fields["event_id"]
            table["chain"] = hashlib.sha256(told.encode()).hexdigest()
            (made,) = event_ids(self.transform.output, feed, partition, [position], [0])
            said.outputs[made] = (fields["who"], table["n"], table["total"], table["chain"])
        return said

    async def dead(self) -> list[tuple[int, int]]:
        """The feed's partition and position of each dead letter, replays dropped."""
        causes = [row["cause"] for _, _, row in await self.records(DEADLETTERS)]
        feed = self.transform.feed
        return sorted((c["partition"], c["position"]) for c in causes if c["topic"] == feed)

    @asynccontextmanager
    async def process(
        self, log: Path, fault: str = "", arm: str = ""
    ) -> AsyncIterator[asyncio.subprocess.Process]:
        """The transforms' process, ended whatever happens."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        environment = {
            **self.environment,
            "CAUSEMESH_API_PORT": str(self.port),
            "CAUSEMESH_FAULT": fault,
        }
        if arm:
            arms = str(Path(__file__).parent / "arms")
            environment |= {"CAUSEMESH_TEST_ARM": arm, "PYTHONPATH": f"{arms}:{ROOT}"}
        with log.open("ab") as output:
            child = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "services.features.transforms.app",
                cwd=ROOT, env=environment, stdout=output, stderr=output,
            )  # fmt: skip
        try:
            yield child
        finally:
            if child.returncode is None:
                child.kill()
                await child.wait()

    async def ready(self, child: asyncio.subprocess.Process) -> None:
        """Wait until the process says that it can work."""
        async with asyncio.timeout(60), httpx.AsyncClient(verify=False) as client:
            while child.returncode is None:
                try:
                    url = f"http://127.0.0.1:{self.port}/ready"
                    if (await client.get(url)).status_code == 200:
                        return
                except httpx.TransportError:
                    pass
                await asyncio.sleep(0.1)
        raise AssertionError("the process ended")

    async def settled(self, timeout_s: float = 90) -> None:
        """Wait until every event is on the feed, and the feed is stored to its ends."""
        same = 0
        async with asyncio.timeout(timeout_s):
            while same < 3:
                same = same + 1 if await self._stored_to_the_end() else 0
                await asyncio.sleep(0.4)

    async def _stored_to_the_end(self) -> bool:
        steps = await self.records(f"events.{self.step}")
        fed = await self.records(self.transform.feed)
        rows = await self.stored()
        ends = await self.reader.ends([self.transform.feed])
        nothing = {"sequence": -1}
        return len(fed) == sum(row["who"] is not None for *_, row in steps) and all(
            rows.get(b"p%d" % number, nothing)["sequence"] >= span.last
            for (_, number), span in ends.items()
        )


@pytest.fixture
async def world(cluster: Endpoints, tmp_path: Path) -> AsyncIterator[World]:
    made = World(cluster, tmp_path / "project")
    await made.open()
    try:
        yield made
    finally:
        await made.close()
