"""inbox -> facts -> effects and, through the outbox, -> audits: a process to kill at any step.

Run as `python -m tests.chaos.pipeline PLAN`, where PLAN is the JSON of a `Plan`; CAUSEMESH_FAULT
arms a fault point. Every record ends as one row of `effects` and one of `audits`, or something was
lost or doubled.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import sqlalchemy as sa

from causemesh.bus.kafka import KafkaBus
from causemesh.catalogue import DEADLETTERS, WATERMARK, Catalogue
from causemesh.clock import SystemClock
from causemesh.codec.decode import Decoder
from causemesh.codec.encode import RegistryEncoders
from causemesh.codec.registry import HttpRegistry
from causemesh.errors import Fenced
from causemesh.faultpoints import arm
from causemesh.outbox import Event, OutboxDrain, add_events
from causemesh.positions import Checkpoint, Claim, Unit
from causemesh.positions_sql import SqlPositionStore, _SqlUnit, checkpoints
from causemesh.runner import (
    Batch,
    Emission,
    Emitter,
    Limits,
    Outgoing,
    PartitionWorker,
    Processor,
    Runner,
    Stage,
)
from causemesh.sql import open_engine

PARTITIONS = 2
EVERYONE = ("door", "sink", "auditor", "external")
INSERT_EFFECT = sa.text("INSERT INTO effects VALUES (:event_id)")
INSERT_AUDIT = sa.text("INSERT INTO audits VALUES (:event_id)")


@dataclass(frozen=True)
class Plan:
    """Where the servers are, the name that makes topics unique, and what protects."""

    kafka: str
    registry: str
    database: str
    name: str
    deduplicate: bool = True
    """False is a control arm: readers take repeats for news."""
    fenced: bool = True
    """False is a control arm: a worker that was replaced commits as if it still owned."""
    pause_at: int = 0
    """The unit of the sink, counted from 1, in which the process stops itself by SIGSTOP, its
    effects written and not committed; 0 for none."""
    idle_ms: int = 0
    """After which the server ends an idle transaction; 0, a control arm, for never."""

    @property
    def inbox(self) -> str:
        return f"inbox.t{self.name}"

    @property
    def facts(self) -> str:
        return f"facts.t{self.name}"

    @property
    def audits(self) -> str:
        return f"audits.t{self.name}"

    def catalogue(self) -> Catalogue:
        core = Catalogue.load()
        dead = replace(core.topic(DEADLETTERS), producers=EVERYONE)
        common: dict[str, Any] = {
            "owner": "door",
            "producers": EVERYONE,
            "consumers": EVERYONE,
            "sources": (self.inbox,),
            "partitions": PARTITIONS,
            "compatibility": "NONE",
        }
        made = [
            replace(core.topic("inbox.requests"), name=self.inbox, **common),
            replace(core.topic("inference.requests.v1"), name=self.facts, **common),
            replace(core.topic("training.requests.v1"), name=self.audits, **common),
        ]
        topics = {topic.name: topic for topic in [*made, dead]}
        return Catalogue(topics, {}, {WATERMARK: core.controls[WATERMARK]})


def session_name(pid: int) -> str:
    """What the database sessions of a pipeline's process are called."""
    return f"chaos-{pid}"


class _Plain:
    takes_bad_rows = False
    stateful = False

    def snapshot(self) -> bytes | None:
        return None

    def restore(self, state: bytes | None) -> None:
        """No state."""


class _Door(_Plain):
    def __init__(self, target: str) -> None:
        self._target = target

    async def process(self, batches: Sequence[Batch], watermark_us: int, tx: Any) -> Emission:
        return Emission([self._pass(batch) for batch in batches])

    def _pass(self, batch: Batch) -> Outgoing:
        keys = [batch.raw.keys[row] for row in batch.rows.tolist()]
        at = (batch.topic, batch.partition, batch.positions)
        return Outgoing(self._target, batch.frame, keys, *at)


class _Sink(_Plain):
    def __init__(self, audits: str, pause_at: int) -> None:
        self._audits = audits
        self._units_left = pause_at

    async def process(self, batches: Sequence[Batch], watermark_us: int, tx: Any) -> Emission:
        for batch in batches:
            ids = batch.frame["event_id"].to_list()
            await tx.execute(INSERT_EFFECT, [{"event_id": one} for one in ids])
            # "reason" carries the id: the topic derives its own event_id
            events = [
                Event(
                    self._audits,
                    "m",
                    {"tenant_id": "t", "occurred_at": 0, "model": "m", "version": 1, "reason": one},
                )
                for one in ids
            ]
            await add_events(tx, events)
        if batches:
            self._units_left -= 1
            if self._units_left == 0:
                os.kill(os.getpid(), signal.SIGSTOP)
        return Emission()


class _Unfenced(SqlPositionStore):
    """Commits under whatever claim is in force."""

    @asynccontextmanager
    async def _unit(self, claim: Claim) -> AsyncIterator[Unit]:
        async with super()._unit(claim) as unit:
            yield _Stolen(unit, claim)


@dataclass
class _Stolen:
    unit: Unit
    claim: Claim

    @property
    def transaction(self) -> Any:
        return self.unit.transaction

    async def commit(self, checkpoint: Checkpoint) -> None:
        theirs = sa.select(checkpoints.c.epoch).where(
            checkpoints.c.group_name == self.claim.group,
            checkpoints.c.partition == self.claim.partition,
        )
        while True:
            epoch = (await self.transaction.execute(theirs)).scalar_one()
            try:
                unit = _SqlUnit(self.transaction, replace(self.claim, epoch=epoch))
                await unit.commit(checkpoint)
            except Fenced:  # claimed once more since it was read
                continue
            return


class _Auditor(_Plain):
    async def process(self, batches: Sequence[Batch], watermark_us: int, tx: Any) -> Emission:
        for batch in batches:
            rows = [{"event_id": one} for one in batch.frame["reason"].to_list()]
            await tx.execute(INSERT_AUDIT, rows)
        return Emission()


async def run(plan: Plan) -> None:
    """All three stages and the drain, until the process ends."""
    catalogue, clock = plan.catalogue(), SystemClock()
    bus, registry = KafkaBus(plan.kafka, session_timeout_ms=3_000), HttpRegistry(plan.registry)
    engine = open_engine(plan.database, session_name(os.getpid()), plan.idle_ms)
    encoders, producer = RegistryEncoders(registry), bus.producer("chaos")

    def runner(name: str, reads: str, processor: Processor, writes: tuple[str, ...] = ()) -> Runner:
        stage = Stage(name, f"{name}-{plan.name}", (reads,), writes)

        def worker(partition: int) -> PartitionWorker:
            return PartitionWorker(
                stage,
                partition,
                processor,
                bus=bus,
                store=SqlPositionStore(engine) if plan.fenced else _Unfenced(engine),
                catalogue=catalogue,
                decoder=Decoder(registry),
                emitter=Emitter(catalogue, encoders, producer, writes),
                clock=clock,
                limits=Limits(max_records=20, max_wait_s=0.1),
                deduplicate=plan.deduplicate,
            )

        return Runner(bus.membership(stage.group, stage.shared), worker, clock)

    audits = Emitter(catalogue, encoders, producer, (plan.audits,))
    await asyncio.gather(
        runner("door", plan.inbox, _Door(plan.facts), (plan.facts,)).run(),
        runner("sink", plan.facts, _Sink(plan.audits, plan.pause_at)).run(),
        runner("auditor", plan.audits, _Auditor()).run(),
        OutboxDrain("chaos", engine, catalogue, audits).run(),
    )


if __name__ == "__main__":
    arm(os.environ.get("CAUSEMESH_FAULT", ""))
    asyncio.run(run(Plan(**json.loads(sys.argv[1]))))
