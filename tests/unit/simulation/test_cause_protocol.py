"""The real runner under seeded crashes, pauses, partial sends, failed sends and zombies.

The workers are driven by hand, one visible step at a time, so a seed names one interleaving
exactly. Each protection switched off in turn must break runs: a protection whose absence goes
unnoticed is either useless or untested.
"""

from __future__ import annotations

import os
import random
import types
from collections.abc import Coroutine, Generator
from dataclasses import dataclass
from typing import Any

import pytest

from causemesh.errors import MeshError, Retryable
from causemesh.positions import MemoryPositionStore
from causemesh.runner import Emitter, Limits, PartitionWorker, Stage

from .topology import (
    PARTITIONS,
    Door,
    Join,
    PickleCodec,
    Sink,
    catalogue,
    expected,
    fill,
    make_bus,
    make_source,
)

SEEDS = int(os.environ.get("CAUSEMESH_SIMULATION_SEEDS", "2000"))
CHUNKS = 8
CATALOGUE = catalogue()
STAGES = (
    Stage("door", "door.e", ("inbox.e",), ("events.e",)),
    Stage("door", "door.r", ("inbox.r",), ("requests",)),
    Stage("join", "join", ("events.e", "requests"), ("answers",)),
    Stage("sink", "sink", ("answers",)),
)


@dataclass(frozen=True)
class Arm:
    """Which protections are on."""

    fenced: bool = True
    deduplicate: bool = True
    by_position: bool = True
    keep_buffers: bool = True
    stop_on_failed_send: bool = True


@types.coroutine
def visible(label: str) -> Generator[str, None, None]:
    """Hand control to the simulation."""
    yield label


class StepClock:
    """Sleeping is just another step."""

    def now_us(self) -> int:
        return 0

    def monotonic(self) -> float:
        return 0.0

    async def sleep(self, seconds: float) -> None:
        await visible("sleep")


class FailingProducer:
    """Loses the connection at random, before or in the middle of a send."""

    def __init__(self, inner: Any, rng: random.Random, arm: Arm) -> None:
        self._inner = inner
        self._rng = rng
        self._arm = arm
        self.calm = False

    async def send(self, outbound: Any) -> None:
        if self.calm or self._rng.random() >= 0.05:
            await self._inner.send(outbound)
            return
        await self._inner.send(outbound[: self._rng.randrange(len(outbound) + 1)])
        if self._arm.stop_on_failed_send:
            raise Retryable("the connection was lost")

    async def close(self) -> None:
        await self._inner.close()


class Simulation:
    """One seed of one arm."""

    def __init__(self, seed: int, arm: Arm) -> None:
        self.rng = random.Random(seed)
        self.arm = arm
        self.bus = make_bus(visible)
        self.store = MemoryPositionStore(visible, fenced=arm.fenced)
        self.sources = {
            (topic, partition): make_source(self.rng, topic, partition, 9)
            for topic in ("inbox.e", "inbox.r")
            for partition in range(PARTITIONS)
        }
        self.calm = False
        drive(fill(self.bus, self.sources), 10_000)

    def start(self, key: tuple[int, int]) -> Coroutine[Any, Any, None]:
        stage = STAGES[key[0]]
        producer = FailingProducer(self.bus.producer("sim"), self.rng, self.arm)
        producer.calm = self.calm
        processor: Any = Door()
        if stage.group == "join":
            processor = Join(by_position=self.arm.by_position, keep_buffers=self.arm.keep_buffers)
        elif stage.group == "sink":
            processor = Sink()
        worker = PartitionWorker(
            stage,
            key[1],
            processor,
            bus=self.bus,
            store=self.store,
            catalogue=CATALOGUE,
            decoder=PickleCodec(),
            emitter=Emitter(CATALOGUE, PickleCodec(), producer, stage.writes),
            clock=StepClock(),
            limits=Limits(
                max_records=self.rng.randint(1, 7),
                commit_every_units=self.rng.randint(1, 3),
                # Time stands still here, so that these then commit when they are idle only.
                commit_every_s=0.0 if stage.group == "sink" else self.rng.choice([0.0, 1.0]),
            ),
            deduplicate=self.arm.deduplicate,
        )
        return worker.run()

    def run(self) -> bool:
        """Whether the sink ends with every answer exactly once."""
        keys = [
            (stage, partition) for stage in range(len(STAGES)) for partition in range(PARTITIONS)
        ]
        live: dict[tuple[int, int], list[Coroutine[Any, Any, None]]] = {key: [] for key in keys}
        for _ in range(700):
            key = self.rng.choice(keys)
            workers = live[key]
            chance = self.rng.random()
            if chance < 0.03 or not workers:
                workers.append(self.start(key))
            elif chance < 0.06:
                workers.pop(self.rng.randrange(len(workers))).close()
                continue
            worker = self.rng.choice(workers)
            if not advance(worker, self.rng.randint(1, 4)):
                workers.remove(worker)
        self.settle(keys, live)
        return self.result() == expected(self.sources)

    def settle(self, keys: Any, live: Any) -> None:
        """Old workers may still take some steps; then one quiet worker each drains its input."""
        self.calm = True
        for key in keys:
            owner = self.start(key)
            for worker in live[key]:
                advance(worker, self.rng.randint(0, 5))
            drive(owner, 5)
            for worker in live[key]:
                worker.close()

    def result(self) -> dict[str, list[str]] | None:
        effects = [
            effect
            for (group, _), row in self.store.rows.items()
            if group == "sink"
            for effect in row.effects
        ]
        answers = dict(effects)
        return answers if len(answers) == len(effects) else None


def advance(worker: Coroutine[Any, Any, None], steps: int) -> bool:
    """Take some steps; False when the worker has ended."""
    try:
        for _ in range(steps):
            worker.send(None)
    except (StopIteration, MeshError):
        return False
    return True


def drive(worker: Coroutine[Any, Any, None], quiet: int) -> None:
    """Run until the worker only polls (`quiet` fetches in a row without another step) or ends."""
    polls = 0
    try:
        while polls < quiet:
            polls = polls + 1 if worker.send(None) == "fetch" else 0
    except (StopIteration, MeshError):
        pass
    worker.close()


def violations(arm: Arm, seeds: range) -> int:
    return sum(not Simulation(seed, arm).run() for seed in seeds)


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_every_request_is_answered_once_and_rightly(chunk: int) -> None:
    seeds = range(chunk * SEEDS // CHUNKS, (chunk + 1) * SEEDS // CHUNKS)
    assert violations(Arm(), seeds) == 0


@pytest.mark.parametrize(
    "arm",
    [
        Arm(fenced=False),
        Arm(deduplicate=False),
        Arm(by_position=False),
        Arm(keep_buffers=False),
        Arm(stop_on_failed_send=False),
    ],
    ids=[
        "no fence",
        "no marks",
        "emit by event time",
        "buffers not committed",
        "skip failed sends",
    ],
)
def test_each_protection_is_needed(arm: Arm) -> None:
    assert violations(arm, range(60)) > 0
