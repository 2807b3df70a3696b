"""The skew monitor: silent for what the lake gives, too, and loud for a wrong vector."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import polars as pl
import pytest
from prometheus_client import CollectorRegistry, Counter

from causemesh.bus.base import Outbound
from causemesh.bus.memory import MemoryBus, no_step
from causemesh.catalogue import DEADLETTERS, LAKE
from causemesh.clock import SystemClock
from causemesh.codec.columns import frame_schema
from causemesh.codec.decode import Decoder
from causemesh.codec.encode import RegistryEncoders
from causemesh.codec.registry import MemoryRegistry
from causemesh.positions import MemoryPositionStore
from causemesh.runner import Emitter, Limits, PartitionWorker, Stage
from services.features.lake.settings import LakeWriterSettings
from services.features.lake.skew_wiring import skew_monitor
from services.features.lake.skewing import SKEW, SkewLimits, SkewMonitor
from services.features.lateness import LATE
from services.features.offline.logged import PREDICTIONS, REQUESTS, VERSIONS
from services.features.offline.skew import SkewCheck
from tests.unit.features.lakes import fill, lake_of
from tests.unit.features.test_training_sets import (
    SENSORS,
    START,
    definitions_of,
    late_record,
    readings,
)

DEFINITIONS = definitions_of(SENSORS)
FEATURES = ["sensors.count_1h", "sensors.value_mean_1h", "input.more", "made.per_reading"]
RIGHT = [2.0, 3.0, 0.5, 3.0]  # 1 and 5; 5 / 2 + 0.5
AT_MINUTE = 30


def fill_lake(folder: Path, count: int, mode: str = "replay", whole_minutes: int = 60) -> None:
    """Two readings, and requests r0.. half an hour after the first, a second apart."""
    whole_us = int((START + timedelta(minutes=whole_minutes)).timestamp() * 1e6)
    requests = pl.DataFrame(
        {
            "event_id": [f"r{n}" for n in range(count)],
            "tenant_id": ["t"] * count,
            "occurred_at": times(count),
            "model": ["m"] * count,
            "mode": [mode] * count,
            "entities": [[{"name": "sensor", "value": "s"}]] * count,
            "inputs": [[{"name": "more", "value": 0.5}]] * count,
        }
    )
    versions = pl.DataFrame(
        {"tenant_id": ["-"], "occurred_at": [START], "model": ["m"], "version": [1],
         "features": [FEATURES]}
    )  # fmt: skip
    fill(
        folder,
        DEFINITIONS.catalogue,
        {"events.reading": readings([1.0, 5.0], [0, 10]), REQUESTS: requests, VERSIONS: versions},
        whole_before_us=whole_us,
    )


def times(count: int) -> list[Any]:
    return [START + timedelta(minutes=AT_MINUTE, seconds=n) for n in range(count)]


def predictions(vectors: Sequence[Sequence[float]], outcome: str = "predicted") -> pl.DataFrame:
    count = len(vectors)
    frame = pl.DataFrame(
        {
            "event_id": [f"p{n}" for n in range(count)],
            "tenant_id": ["t"] * count,
            "occurred_at": times(count),
            "cause": [
                {"topic": "tasks", "partition": 0, "position": n, "index": 0, "origin": None}
                for n in range(count)
            ],
            "request_id": [f"r{n}" for n in range(count)],
            "model": ["m"] * count,
            "version": [1] * count,
            "outcome": [outcome] * count,
            "score": [0.5] * count,
            "reason": pl.Series([None] * count, dtype=pl.String),
            "vector": [np.array(one, "<f4").tobytes() for one in vectors],
            "lane": ["realtime"] * count,
            "compute_ms": [0.5] * count,
            "predicted_at": times(count),
        }
    )
    return frame.cast(dict(frame_schema(DEFINITIONS.catalogue.topic(PREDICTIONS).record)))


class Watched:
    """The monitor on its stage: real worker, codec and emitter; the log in memory."""

    def __init__(self, folder: Path, *, share: float = 1.0, wait_s: float = 0.0) -> None:
        self.catalogue, self.bus, self.registry = (
            DEFINITIONS.catalogue,
            MemoryBus(),
            MemoryRegistry(),
        )
        for name in (PREDICTIONS, SKEW, DEADLETTERS):
            self.bus.create(name, self.catalogue.topic(name).partitions)
        self.lake = lake_of(folder, self.catalogue)
        self.limits = SkewLimits(share, wait_s, every_s=0.01)
        self.outcomes = Counter("o", "", ("kind", "outcome"), registry=CollectorRegistry())
        self.store = MemoryPositionStore(no_step)
        self.monitors: list[SkewMonitor] = []

    def worker(self) -> PartitionWorker:
        check = SkewCheck(self.lake, DEFINITIONS, 60_000_000)
        monitor = SkewMonitor(
            check.check, 0, limits=self.limits, clock=SystemClock(), outcomes=self.outcomes
        )
        self.monitors.append(monitor)
        encoders = RegistryEncoders(self.registry)
        producer = self.bus.producer("lake")
        return PartitionWorker(
            Stage(LAKE, "lake-skew", (PREDICTIONS,), (SKEW,)),
            0,
            monitor,
            bus=self.bus,
            store=self.store,
            catalogue=self.catalogue,
            decoder=Decoder(self.registry),
            emitter=Emitter(self.catalogue, encoders, producer, [SKEW, DEADLETTERS]),
            clock=SystemClock(),
            limits=Limits(max_records=3, max_wait_s=0.01),
        )

    async def predict(self, frame: pl.DataFrame) -> None:
        topic = self.catalogue.topic(PREDICTIONS)
        encoder = await RegistryEncoders(self.registry).encoder(topic.subject, topic.record)
        values = encoder.encode(frame)
        keys: list[bytes | None] = [b"k"] * len(values)
        await self.bus.producer("test").send([Outbound(topic.name, 0, keys, values)])

    async def run(self, seconds: float = 1.5, until: int | None = None) -> None:
        """Let a worker work until so many vectors are done with, or for a while."""
        worker = self.worker()
        running = asyncio.create_task(worker.run())
        for _ in range(round(seconds / 0.02)):
            await asyncio.sleep(0.02)
            if until is not None and self.compared() >= until:
                break
        worker.stopping = True
        await running

    def counted(self, outcome: str) -> int:
        return int(self.outcomes.labels("skew", outcome)._value.get())

    def compared(self) -> int:
        return self.counted("same") + self.counted("different") + self.counted("not_declared")

    async def alerts(self) -> list[dict[str, Any]]:
        schema = self.catalogue.topic(SKEW).record
        values = [
            value
            for partition in range(self.catalogue.topic(SKEW).partitions)
            for value in self.bus.log(SKEW, partition).values
        ]
        return (await Decoder(self.registry).decode(values, schema)).frame.to_dicts()


@pytest.mark.parametrize("mode", ["replay", "live"])
async def test_right_vectors_are_silent(tmp_path: Path, mode: str) -> None:
    fill_lake(tmp_path, 4, mode)
    watched = Watched(tmp_path)
    await watched.predict(predictions([RIGHT] * 4))
    await watched.run(20, until=4)
    assert (watched.counted("same"), watched.counted("different")) == (4, 0)
    assert await watched.alerts() == []


@pytest.mark.parametrize("told", [True, False])
async def test_a_late_event_that_was_taken_is_no_difference(tmp_path: Path, told: bool) -> None:
    """Control: where the record of it is not in the lake."""
    fill_lake(tmp_path, 2)
    until_us = int((START + timedelta(minutes=AT_MINUTE)).timestamp() * 1e6)
    events = readings([1.0, 5.0], [0, 10])
    late = await late_record(DEFINITIONS, events, 1, taken=True, until_us=until_us)
    fill(tmp_path, DEFINITIONS.catalogue, {LATE: late if told else late.clear()})
    watched = Watched(tmp_path)
    without = [1.0, 1.0, 0.5, 1.5]
    await watched.predict(predictions([without] * 2))
    await watched.run(20, until=2)
    counted = (watched.counted("same"), watched.counted("different"))
    assert counted == ((2, 0) if told else (0, 2))


async def test_what_was_read_is_compared_when_nothing_more_comes(tmp_path: Path) -> None:
    fill_lake(tmp_path, 4)
    watched = Watched(tmp_path, wait_s=0.5)
    await watched.predict(predictions([RIGHT] * 4))
    await watched.run(20, until=4)
    assert watched.counted("same") == 4


async def test_a_wrong_vector_alerts_and_names_its_prediction(tmp_path: Path) -> None:
    fill_lake(tmp_path, 4)
    watched = Watched(tmp_path)
    wrong = [2.0, 3.5, 99.0, float("nan")]  # what came with the request is nobody's to recompute
    await watched.predict(predictions([RIGHT, RIGHT, wrong, RIGHT]))
    await watched.run(20, until=4)
    assert (watched.counted("same"), watched.counted("different")) == (3, 1)
    (alert,) = await watched.alerts()
    cause = alert["cause"]
    assert (cause["topic"], cause["partition"], cause["position"]) == (PREDICTIONS, 0, 2)
    assert (alert["request_id"], alert["model"], alert["version"]) == ("r2", "m", 1)
    assert (alert["mode"], alert["tenant_id"]) == ("replay", "t")
    assert alert["features_as_of"] == START + timedelta(minutes=AT_MINUTE)
    assert alert["features"] == [
        {"feature": "sensors.value_mean_1h", "served": 3.5, "recomputed": 3.0},
        {"feature": "made.per_reading", "served": None, "recomputed": 3.0},
    ]


async def test_vectors_wait_until_the_lake_has_got_so_far(tmp_path: Path) -> None:
    """And over a restart: they are part of the checkpoint."""
    fill_lake(tmp_path, 2, whole_minutes=AT_MINUTE - 1)
    watched = Watched(tmp_path)
    await watched.predict(predictions([RIGHT, [1.0, 3.0, 0.5, 5.5]]))
    await watched.run(0.5)
    assert watched.compared() == 0
    fill(tmp_path, DEFINITIONS.catalogue, {"events.reading": readings([], [])})  # whole for ever
    await watched.run(20, until=2)
    assert (watched.counted("same"), watched.counted("different")) == (1, 1)
    assert [one["request_id"] for one in await watched.alerts()] == ["r1"]


async def test_what_the_lake_never_gets_to_is_given_up(tmp_path: Path) -> None:
    fill_lake(tmp_path, 2, whole_minutes=AT_MINUTE - 1)
    watched = Watched(tmp_path)
    watched.limits = replace(watched.limits, give_up_s=0.3)
    await watched.predict(predictions([RIGHT, RIGHT]))
    for _ in range(10):
        if watched.counted("not_whole") < 2:
            await watched.run(2)
    assert watched.counted("not_whole") == 2
    assert watched.compared() == 0


async def test_a_share_of_the_requests_is_sampled_by_their_ids(tmp_path: Path) -> None:
    fill_lake(tmp_path, 60)
    watched = Watched(tmp_path, share=0.25)
    await watched.predict(predictions([RIGHT] * 60))
    chosen = sum(zlib.crc32(f"r{n}".encode()) < 2**30 for n in range(60))
    await watched.run(20, until=chosen)
    assert 0 < chosen < 60
    assert watched.counted("same") == chosen


async def test_what_the_project_does_not_declare_is_counted_apart(tmp_path: Path) -> None:
    fill_lake(tmp_path, 1)
    watched = Watched(tmp_path)
    await watched.predict(predictions([RIGHT]).with_columns(pl.lit(7, pl.Int32).alias("version")))
    await watched.run(20, until=1)
    assert watched.counted("not_declared") == 1
    await watched.predict(predictions([RIGHT], outcome="failed"))
    await watched.run(0.3)
    assert watched.compared() == 1


async def test_off_by_default_it_reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CAUSEMESH_SKEW_SHARE", raising=False)
    settings = LakeWriterSettings()
    made: list[Any] = []
    service = SimpleNamespace(runner=lambda *args, **_: made.append(args))
    nothing = cast(Any, None)
    async with skew_monitor(cast(Any, service), settings, nothing, nothing):
        assert made == []
