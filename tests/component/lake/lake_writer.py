"""A writer of one topic as a process that can be killed or paused at any step.

usage: python -m tests.component.lake.lake_writer '<Plan as JSON>'   (CAUSEMESH_FAULT arms a point)
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from dataclasses import dataclass, replace
from typing import Any

from pyiceberg.table import Table

from causemesh.bus.kafka import KafkaBus
from causemesh.catalogue import DEADLETTERS, LAKE, WATERMARK, Catalogue
from causemesh.clock import SystemClock
from causemesh.codec.decode import Decoder
from causemesh.codec.encode import RegistryEncoders
from causemesh.codec.registry import HttpRegistry
from causemesh.faultpoints import arm
from causemesh.lake.commits import Change
from causemesh.lake.definitions import LakeDefinition, TableDefinition, define_lake, table_name
from causemesh.lake.opening import open_catalog
from causemesh.lake.progress import TableProgress
from causemesh.lake.reading import Lake
from causemesh.lake.settings import LakeSettings
from causemesh.runner import Emitter, Limits, PartitionWorker, Runner, Stage
from services.features.lake.decoding import WidestDecoder
from services.features.lake.sinks import Sink, Writing
from services.features.lake.store import FlushLimits, LakeStore
from services.features.lake.wiring import groups_of
from services.features.lake.writing import LakeWriter

PARTITIONS = 2
EVERYONE = (LAKE, "external")


@dataclass(frozen=True)
class Plan:
    """Where the servers are, a name for this run's topic, and which protections are on."""

    kafka: str
    registry: str
    catalog: str
    warehouse: str
    name: str
    arm: str = "protected"

    @property
    def facts(self) -> str:
        return f"facts.t{self.name}"

    def catalogue(self) -> Catalogue:
        core = Catalogue.load()
        common: dict[str, Any] = {"producers": EVERYONE, "consumers": EVERYONE}
        facts = replace(
            core.topic("inference.predictions.v1"),
            name=self.facts,
            sources=(),
            partitions=PARTITIONS,
            **common,
        )
        dead = replace(core.topic(DEADLETTERS), lake=False, **common)
        controls = {WATERMARK: core.controls[WATERMARK]}
        return Catalogue({self.facts: facts, dead.name: dead}, {}, controls)

    def definition(self) -> LakeDefinition:
        made = define_lake(self.catalogue(), None)
        curated = TableDefinition(
            "curated", table_name(self.facts), self.facts, 30, {"likely": "score * 100"}
        )
        return LakeDefinition({**made.tables, curated.identifier: curated})

    def lake(self) -> Lake:
        settings = LakeSettings(catalog=self.catalog, warehouse=self.warehouse)
        return Lake(open_catalog(settings), self.definition())


class Blind(Writing):
    """The control arm without a fence: commits whatever the table says."""

    def decide(self, table: Table, progress: TableProgress) -> Change | None:
        forgot = {
            number: replace(progress.of(number), epoch=0, position=part.after)
            for number, part in self._taken.items()
        }
        return super().decide(table, progress.having(forgot))


class BlindSink(Sink):
    writing = Blind


class BlindStore(LakeStore):
    sink = BlindSink


STORES = {"protected": LakeStore, "blind": BlindStore}


async def run(plan: Plan) -> None:
    """Write until SIGTERM."""
    catalogue, definition, clock = plan.catalogue(), plan.definition(), SystemClock()
    bus, registry = KafkaBus(plan.kafka, session_timeout_ms=3_000), HttpRegistry(plan.registry)
    ((group, topics),) = groups_of(catalogue, definition).items()
    stage = Stage(LAKE, f"{group}-{plan.name}", topics)
    catalog = open_catalog(LakeSettings(catalog=plan.catalog, warehouse=plan.warehouse))
    store = STORES[plan.arm](
        catalog,
        catalogue,
        definition,
        {stage.group: topics},
        clock=clock,
        limits=FlushLimits(seconds=0.3),
    )
    producer = bus.producer("lake")
    emitter = Emitter(catalogue, RegistryEncoders(registry), producer, [DEADLETTERS])

    def worker(partition: int) -> PartitionWorker:
        return PartitionWorker(
            stage,
            partition,
            LakeWriter(catalogue, definition),
            bus=bus,
            store=store,
            catalogue=catalogue,
            decoder=WidestDecoder(Decoder(registry), registry),
            emitter=emitter,
            clock=clock,
            limits=Limits(max_records=20, max_wait_s=0.1),
        )

    runner = Runner(bus.membership(stage.group, stage.shared), worker, clock)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, runner.stop)
    flushing = asyncio.create_task(store.run())
    await runner.run()
    flushing.cancel()
    await store.flush()
    catalog.close()
    await producer.close()
    await registry.close()
    await bus.close()


if __name__ == "__main__":
    arm(os.environ.get("CAUSEMESH_FAULT", ""))
    asyncio.run(run(Plan(**json.loads(sys.argv[1]))))
