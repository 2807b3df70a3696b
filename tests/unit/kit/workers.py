"""A worker of one partition of the requests' inbox, on a broker and positions in memory."""

from __future__ import annotations

from typing import Any

from causemesh.bus.memory import MemoryBus, no_step
from causemesh.catalogue import Catalogue
from causemesh.clock import Clock
from causemesh.codec.decode import Decoder
from causemesh.codec.encode import RegistryEncoders
from causemesh.codec.registry import MemoryRegistry
from causemesh.positions import MemoryPositionStore
from causemesh.runner import Emitter, Limits, PartitionWorker, Stage

CATALOGUE = Catalogue.load()
INBOX = "inbox.requests"


def inbox_worker(bus: MemoryBus, processor: Any, clock: Clock, limits: Limits) -> PartitionWorker:
    """The worker, which the processor gets to know as its `worker`: it says when to stop."""
    registry = MemoryRegistry()
    worker = PartitionWorker(
        Stage("ingest", "ingest", (INBOX,)),
        0,
        processor,
        bus=bus,
        store=MemoryPositionStore(no_step),
        catalogue=CATALOGUE,
        decoder=Decoder(registry),
        emitter=Emitter(CATALOGUE, RegistryEncoders(registry), bus.producer("ingest"), ()),
        clock=clock,
        limits=limits,
    )
    processor.worker = worker
    return worker
