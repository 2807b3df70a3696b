"""Processor time of one request that comes alone, stage by stage, on a broker in memory.

usage: python -m benchmarks.lone_request [--rounds 2000] [--profile ingest]

The real workers of ingest, features and inference handle one live request each step; the broker
is `MemoryBus`, positions lie in memory, ids are claimed in memory and the model server answers 0.5
at once, so sockets, Postgres and Triton are not part of it. Best and median of many, in
microseconds of processor time: fit to compare two trees on a machine that does other work too.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import pstats
import statistics
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

from causemesh.bus.memory import MemoryBus, no_step
from causemesh.catalogue import DEADLETTERS, Catalogue
from causemesh.client import REQUESTS, Client
from causemesh.clock import SystemClock
from causemesh.codec.decode import Decoder
from causemesh.codec.encode import RegistryEncoders
from causemesh.codec.registry import MemoryRegistry
from causemesh.outbox import records_frame
from causemesh.positions import MemoryPositionStore
from causemesh.runner import Emitter, Limits, Outgoing, PartitionWorker, Processor, Stage
from causemesh.telemetry import Metrics
from examples.flights import model
from examples.flights.dataset import MODEL
from services.features.domain.parsing import parse_views
from services.features.handlers import Join
from services.features.plan import ROLLOUTS, VERSIONS, Plan, tasks_topic
from services.features.publishing import VECTORS
from services.features.rekeying import INPUTS
from services.inference.deployments import Deployments
from services.inference.domain import ModelVersion
from services.inference.handlers import PREDICTIONS, Predict
from services.ingest.domain import Rules
from services.ingest.handlers import ACCEPTED_REQUESTS, REJECTS, Door, target_of
from services.ingest.store import IdClaims

PROJECT = Path("examples/flights")
_DAY_US = 86_400_000_000
_ANY_TIME_US = 2**61
_NAMED = [name.removeprefix("input.") for name in model.FEATURES if name.startswith("input.")]


class Ids:
    """Claims in memory."""

    def __init__(self) -> None:
        self._taken: set[bytes] = set()

    async def claim(self, claims: IdClaims) -> set[Any]:
        """See `IdStore.claim`; every id here is new."""
        self._taken.update(claims.digests)
        return set()


class Models:
    """One version, with an artefact."""

    async def version(self, name: str, version: int) -> ModelVersion:
        """See `ModelStore.version`."""
        required = tuple(model.REQUIRED)
        features = tuple(model.FEATURES)
        return ModelVersion(name, version, "realtime", features, required, "sha", None, [], {})

    async def artefact(self, sha256: str) -> bytes:
        """See `ModelStore.artefact`."""
        return b"onnx"


class Server:
    """A model server that answers at once."""

    async def load(self, name: str, onnx: bytes, width: int) -> None:
        """See `ModelServer.load`."""

    async def infer(self, name: str, rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        """See `ModelServer.infer`."""
        return np.full(len(rows), 0.5)


class Mesh:
    """Three workers on one partition."""

    def __init__(self) -> None:
        document = yaml.safe_load((PROJECT / "features.yaml").read_text())
        plan = Plan.of(parse_views(document))
        catalogue = Catalogue.load([PROJECT], partitions=1).with_sources(INPUTS, plan.rekeyed)
        self.catalogue = catalogue
        self.bus = MemoryBus()
        self.registry = MemoryRegistry()
        self.decoder = Decoder(self.registry)
        self.client = Client(catalogue, self.registry, self.bus.producer("client"))
        self._store = MemoryPositionStore(no_step)
        self._clock = SystemClock()
        self._metrics = Metrics()
        for topic in catalogue.topics.values():
            self.bus.create(topic.name, topic.partitions)
        inboxes = (REQUESTS, *(kind.inbox for kind in catalogue.event_types.values()))
        door = Door(
            catalogue,
            inboxes,
            ids=Ids(),  # type: ignore[arg-type]
            rules=Rules(32 * _DAY_US, _ANY_TIME_US),  # this bus appends at time 0
            clock=self._clock,
            outcomes=self._metrics.outcomes,
        )
        join = Join(plan, catalogue, 0, slice_us=60_000_000, clock=self._clock, publish_seconds=1.0)
        predict = Predict(
            "realtime",
            Deployments(Models(), Server()),  # type: ignore[arg-type]
            Server(),
            self._clock,
            max_batch=256,
            calls_in_flight=4,
            outcomes=self._metrics.outcomes,
        )
        writes = (*map(target_of, inboxes), REJECTS)
        features = Stage(
            "features",
            "features",
            (ACCEPTED_REQUESTS, INPUTS, *plan.shared),
            (tasks_topic("realtime"), VECTORS),
            (*plan.broadcast, VERSIONS, ROLLOUTS),
        )
        tasks = Stage("inference", "inference", (tasks_topic("realtime"),), (PREDICTIONS,))
        lagging = Limits(max_records=10_000, commit_every_s=0.2)
        self.workers = {
            "ingest": self._worker(Stage("ingest", "ingest", inboxes, writes), door, lagging),
            "features": self._worker(
                features,
                join,
                Limits(max_records=20_000, commit_every_units=20, commit_every_s=1.0),
            ),
            "inference": self._worker(tasks, predict, lagging),
        }
        self.steppers: dict[str, Any] = {}

    def emitter(self, writes: Sequence[str]) -> Emitter:
        """An emitter to some topics."""
        encoders = RegistryEncoders(self.registry)
        return Emitter(self.catalogue, encoders, self.bus.producer("p"), writes)

    def _worker(self, stage: Stage, processor: Processor, limits: Limits) -> PartitionWorker:
        return PartitionWorker(
            stage,
            0,
            processor,
            bus=self.bus,
            store=self._store,
            catalogue=self.catalogue,
            decoder=self.decoder,
            emitter=self.emitter([*stage.writes, DEADLETTERS]),
            clock=self._clock,
            limits=limits,
            observer=self._metrics,
        )

    async def start(self) -> None:
        """Claim each partition, register the model, roll it out, and give the views some state."""
        for name, worker in self.workers.items():
            claim, _ = await self._store.claim(worker.stage.group, 0)
            self.steppers[name] = (worker, claim, self.bus.reader(worker.positions))
        version = await Models().version(MODEL, 1)
        for topic, record in (
            (VERSIONS, version.record(1)),
            (
                ROLLOUTS,
                {
                    "model": MODEL,
                    "schedule": [{"version": 1, "effective_at": 0}],
                    "sequence": 1,
                },
            ),
        ):
            row = {**record, "tenant_id": "causemesh", "occurred_at": 1}
            frame = records_frame(self.catalogue.topic(topic).record, [row])
            at = np.array([0], dtype=np.int64)
            told = Outgoing(topic, frame, [b"m"], "outbox.inference", 0, at)
            await self.emitter([topic]).send([told], {})
        await self._events()
        for name in self.steppers:
            await self.step(name)
            await self.step(name)

    async def _events(self) -> None:
        now = datetime.now(UTC)
        for kind in self.catalogue.event_types.values():
            fields = self.catalogue.topic(kind.inbox).record["fields"]
            rows = [
                {field["name"]: _value(field, number, now) for field in fields}
                for number in range(200)
            ]
            await self.client.produce(kind.name, rows)

    async def step(self, name: str) -> None:
        """One unit of work of a stage."""
        worker, claim, reader = self.steppers[name]
        await worker._step(claim, reader)

    async def ask(self, number: int) -> None:
        """One live request."""
        row = {
            "event_id": f"request-{number}",
            "tenant_id": "AA",
            "occurred_at": datetime.now(UTC),
            "model": MODEL,
            "version": None,
            "entities": [
                {"name": "tail", "value": f"N{number % 200}"},
                {"name": "origin", "value": "origin-1"},
                {"name": "dest", "value": "dest-1"},
                {"name": "carrier", "value": "carrier-1"},
            ],
            "inputs": [{"name": name, "value": 12.0} for name in _NAMED],
        }
        await self.client.request([row])


def _value(field: Mapping[str, Any], number: int, now: datetime) -> Any:
    name, kind = field["name"], str(field["type"])
    if "timestamp" in kind:
        return now
    if name == "event_id":
        return f"{name}-{number}"
    if name in ("tail",):
        return f"N{number}"
    if "string" in kind:
        return f"{name}-{number % 3}"
    return number % 50


async def measured(mesh: Mesh, rounds: int, profiled: str | None) -> dict[str, list[float]]:
    """Microseconds of each stage, a list of `rounds`."""
    taken: dict[str, list[float]] = {name: [] for name in mesh.steppers}
    profile = cProfile.Profile()
    for number in range(rounds):
        await mesh.ask(number)
        for name in mesh.steppers:
            if name == profiled and number > 50:
                profile.enable()
            began = time.process_time_ns()
            await mesh.step(name)
            taken[name].append((time.process_time_ns() - began) / 1000)
            if name == profiled:
                profile.disable()
    answers = mesh.bus.log(PREDICTIONS, 0).values
    decoded = await mesh.decoder.decode(answers, mesh.catalogue.topic(PREDICTIONS).record)
    outcomes = dict(decoded.frame["outcome"].value_counts().iter_rows())
    if outcomes != {"predicted": rounds}:
        reasons = decoded.frame["reason"].unique().to_list()
        raise RuntimeError(f"{rounds} requests, outcomes {outcomes} {reasons}")
    if profiled:
        stats = pstats.Stats(profile)
        stats.sort_stats("tottime").print_stats(40)
        stats.sort_stats("cumtime").print_stats("causemesh|services", 60)
    return taken


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2_000)
    parser.add_argument("--profile", choices=["ingest", "features", "inference"])
    told = parser.parse_args()

    async def run() -> dict[str, list[float]]:
        mesh = Mesh()
        await mesh.start()
        return await measured(mesh, told.rounds, told.profile)

    taken = asyncio.run(run())
    whole = {name: values[len(values) // 10 :] for name, values in taken.items()}
    print(f"{'us of processor time':24}{'best':>8}{'p10':>8}{'median':>8}")
    for name, values in whole.items():
        p10 = float(np.percentile(values, 10))
        print(f"{name:24}{min(values):>8.0f}{p10:>8.0f}{statistics.median(values):>8.0f}")
    rows = [
        (min(values), float(np.percentile(values, 10)), statistics.median(values))
        for values in whole.values()
    ]
    print(f"{'all':24}" + "".join(f"{sum(column):>8.0f}" for column in zip(*rows, strict=True)))


if __name__ == "__main__":
    main()
