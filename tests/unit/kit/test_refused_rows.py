"""Rows that a part of a processor refuses are dead letters, in order with the unreadable."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from causemesh.bus.base import Outbound
from causemesh.bus.memory import MemoryBus, no_step
from causemesh.catalogue import DEADLETTERS, Catalogue
from causemesh.client import REQUESTS, Client
from causemesh.clock import SystemClock
from causemesh.codec.decode import Decoder
from causemesh.codec.encode import RegistryEncoders
from causemesh.codec.registry import MemoryRegistry
from causemesh.log import LogReader
from causemesh.positions import MemoryPositionStore
from causemesh.runner import Batch, Emission, Emitter, Limits, PartitionWorker, Stage

CATALOGUE = Catalogue.load(partitions=1)
ROW = {
    "tenant_id": "t",
    "occurred_at": datetime(2013, 1, 1, tzinfo=UTC),
    "model": "m",
    "version": 1,
    "entities": [],
    "inputs": [],
}


class RefusesOdd:
    """Takes everything, but a part of it can't take requests with an odd number."""

    takes_bad_rows = False
    stateful = False

    def __init__(self) -> None:
        self.took: list[str] = []

    async def process(
        self, batches: Sequence[Batch], watermark_us: int, transaction: Any
    ) -> Emission:
        refused = []
        for batch in batches:
            ids = batch.frame["event_id"].to_list()
            self.took += ids
            odd = {row: f"{one} is odd" for row, one in enumerate(ids) if int(one) % 2}
            refused.append((batch, odd))
        return Emission(refused=refused)

    def snapshot(self) -> bytes | None:
        return None

    def restore(self, state: bytes | None) -> None: ...


async def test_refused_and_unreadable_rows_are_dead_letters_in_one_order() -> None:
    bus, registry = MemoryBus(), MemoryRegistry()
    for topic in (REQUESTS, DEADLETTERS):
        bus.create(topic, 1)
    producer = bus.producer("p")
    client = Client(CATALOGUE, registry, producer)
    for number in range(4):  # at even positions; behind each one that nobody can read
        await client.request([{**ROW, "event_id": str(number)}])
        await producer.send([Outbound(REQUESTS, 0, [None], [b"no record"])])
    processor, decoder = RefusesOdd(), Decoder(registry)
    worker = PartitionWorker(
        Stage("ingest", "ingest", (REQUESTS,)),
        0,
        processor,
        bus=bus,
        store=MemoryPositionStore(no_step),
        catalogue=CATALOGUE,
        decoder=decoder,
        emitter=Emitter(CATALOGUE, RegistryEncoders(registry), bus.producer("w"), [DEADLETTERS]),
        clock=SystemClock(),
        limits=Limits(max_wait_s=0.01),
    )
    claim, _ = await worker._store.claim("ingest", 0)
    reader = bus.reader(worker.positions)
    await worker._step(claim, reader)

    assert processor.took == ["0", "1", "2", "3"]
    log = LogReader(bus, CATALOGUE, decoder)
    letters = [batch.frame async for batch in log.read(await log.ends([DEADLETTERS]))]
    found = [
        (row["cause"]["position"], row["reason"]) for frame in letters for row in frame.to_dicts()
    ]
    assert [at for at, _ in found] == [1, 2, 3, 5, 6, 7]  # by a reader that drops what goes back
    assert [reason for _, reason in found[1::3]] == ["1 is odd", "3 is odd"]
