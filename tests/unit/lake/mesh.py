"""A topic in memory and its tables on local files: the real runner, codec, store and Iceberg."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
from pyiceberg.catalog.sql import SqlCatalog

from causemesh.bus.base import Outbound
from causemesh.bus.memory import MemoryBus
from causemesh.catalogue import DEADLETTERS, WATERMARK, Catalogue, Topic
from causemesh.clock import SystemClock
from causemesh.codec.decode import Decoder
from causemesh.codec.encode import RegistryEncoders
from causemesh.codec.registry import MemoryRegistry
from causemesh.lake.definitions import LakeDefinition, TableDefinition, define_lake
from causemesh.lake.opening import open_catalog
from causemesh.lake.reading import Lake
from causemesh.lake.settings import LakeSettings
from causemesh.runner import Emitter, Limits, PartitionWorker, Stage
from services.features.lake.decoding import WidestDecoder
from services.features.lake.store import FlushLimits, LakeStore
from services.features.lake.wiring import groups_of
from services.features.lake.writing import LakeWriter

PARTITIONS = 2
DAY_US = 86_400_000_000
START_US = 1_356_998_400_000_000  # 2013-01-01
PREDICTIONS = "inference.predictions.v1"
REQUESTS = "inbox.requests"
CURATED = TableDefinition(
    "curated",
    "predictions",
    PREDICTIONS,
    30,
    {"request_id": "request_id", "likely": "score * 100"},
    "outcome = 'predicted'",
)


def lake_settings(folder: Path) -> LakeSettings:
    return LakeSettings(
        catalog=f"sqlite:///{folder}/catalog.db", warehouse=f"file://{folder}/tables"
    )


class LakeMesh:
    """Two topics, their log in memory, and writers that come and go."""

    def __init__(
        self,
        folder: Path,
        *,
        curated: Sequence[TableDefinition] = (CURATED,),
        store: type[LakeStore] = LakeStore,
        limits: FlushLimits | None = None,
    ) -> None:
        core = Catalogue.load(partitions=PARTITIONS)
        topics = {name: core.topic(name) for name in (PREDICTIONS, REQUESTS, DEADLETTERS)}
        quiet = replace(topics[DEADLETTERS], lake=False)
        sourced = replace(topics[PREDICTIONS], sources=())
        self.catalogue = Catalogue(
            {**topics, DEADLETTERS: quiet, PREDICTIONS: sourced},
            {},
            {WATERMARK: core.controls[WATERMARK]},
        )
        made = define_lake(self.catalogue, None)
        self.definition = LakeDefinition(
            {**made.tables, **{one.identifier: one for one in curated}}
        )
        self.bus = MemoryBus()
        for topic in self.catalogue.topics.values():
            self.bus.create(topic.name, topic.partitions)
        self.registry = MemoryRegistry()
        self.settings = lake_settings(folder)
        self._store = store
        self.max_records = 7
        self.limits = limits or FlushLimits(seconds=1e6, position_s=1e6)
        ((self.group, topics_read),) = groups_of(self.catalogue, self.definition).items()
        self.stage = Stage("lake", self.group, topics_read)

    def catalog(self) -> SqlCatalog:
        return open_catalog(self.settings)

    def lake(self) -> Lake:
        return Lake(self.catalog(), self.definition)

    def store(self) -> LakeStore:
        return self._store(
            self.catalog(),
            self.catalogue,
            self.definition,
            {self.group: self.stage.shared},
            clock=SystemClock(),
            limits=self.limits,
        )

    def worker(self, store: LakeStore, partition: int) -> PartitionWorker:
        emitter = Emitter(
            self.catalogue,
            RegistryEncoders(self.registry),
            self.bus.producer("lake"),
            [DEADLETTERS],
        )
        return PartitionWorker(
            self.stage,
            partition,
            LakeWriter(self.catalogue, self.definition),
            bus=self.bus,
            store=store,
            catalogue=self.catalogue,
            decoder=WidestDecoder(Decoder(self.registry), self.registry),
            emitter=emitter,
            clock=SystemClock(),
            limits=Limits(max_records=self.max_records, max_wait_s=0.01),
        )

    async def read_all(self, store: LakeStore, partition: int) -> None:
        """Let a worker of the partition read to the end of its log and stop; nothing is flushed."""
        worker = self.worker(store, partition)
        running = asyncio.create_task(worker.run())
        try:
            async with asyncio.timeout(20):
                await self._read(worker, running)
            worker.stopping = True
            await running
        finally:
            running.cancel()

    async def _read(self, worker: PartitionWorker, running: asyncio.Task[None]) -> None:
        ends = {
            (topic, worker.partition): len(self.bus.log(topic, worker.partition).values) - 1
            for topic in self.stage.shared
        }
        while not running.done() and any(  # noqa: ASYNC110 - polls a worker
            worker.positions[at] < end for at, end in ends.items()
        ):
            await asyncio.sleep(0.005)

    async def write_all(self) -> None:
        """One life of a writer process."""
        store = self.store()
        for partition in range(PARTITIONS):
            await self.read_all(store, partition)
        await store.flush()

    async def predict(self, first: int, count: int, partition: int = 0, **more: Any) -> None:
        """Predictions r<first>.., six hours apart, of two tenants, caused by as many tasks."""
        numbers = range(first, first + count)
        frame = pl.DataFrame(
            {
                "event_id": [f"p{n}" for n in numbers],
                "tenant_id": [f"t{n % 2}" for n in numbers],
                "occurred_at": instants([START_US + n * DAY_US // 4 for n in numbers]),
                "cause": [
                    {"topic": "tasks", "partition": partition, "position": n, "index": 0,
                     "origin": None}
                    for n in numbers
                ],
                "request_id": [f"r{n}" for n in numbers],
                "model": ["m"] * count,
                "version": pl.Series([1] * count, dtype=pl.Int32),
                "outcome": ["predicted" if n % 5 else "failed" for n in numbers],
                "score": [n / 1000 for n in numbers],
                "reason": pl.Series([None] * count, dtype=pl.String),
                "vector": [b"\x00\x00\x80?"] * count,
                "lane": ["realtime"] * count,
                "compute_ms": [0.5] * count,
                "predicted_at": instants([START_US] * count),
            }
        )  # fmt: skip
        for name, value in more.items():
            frame = frame.with_columns(pl.lit(value).alias(name))
        await self.append(self.catalogue.topic(PREDICTIONS), frame, partition)

    async def append(self, topic: Topic, frame: pl.DataFrame, partition: int) -> None:
        """Encode and append to the log."""
        encoder = await RegistryEncoders(self.registry).encoder(topic.subject, topic.record)
        await self.lay(topic.name, encoder.encode(frame), partition)

    async def lay(self, topic: str, values: Sequence[bytes], partition: int) -> None:
        """Append bytes to the log."""
        keys: list[bytes | None] = [b"k"] * len(values)
        await self.bus.producer("test").send([Outbound(topic, partition, keys, list(values))])

    def rows(self, table: str) -> list[tuple[int, int]]:
        """(partition, position) of each row, sorted: what lost or doubled rows show in."""
        if table not in {one.identifier for one, _ in self.lake().tables()}:
            return []
        found = self.lake().select(table, columns=["_partition", "_position"]).lazy().collect()
        return sorted(found.rows())

    def logged(self, topic: str) -> list[tuple[int, int]]:
        """(partition, position) of every record in the log."""
        return [
            (partition, position)
            for partition in range(PARTITIONS)
            for position in range(len(self.bus.log(topic, partition).values))
        ]


def instants(at_us: Sequence[int]) -> pl.Series:
    return pl.Series(at_us, dtype=pl.Int64).cast(pl.Datetime("us", "UTC"))
