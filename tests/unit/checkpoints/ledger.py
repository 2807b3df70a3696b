"""A processor with state in pieces, and a worker for it: each record's position is booked once."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

from causemesh.bus.base import Outbound
from causemesh.bus.memory import MemoryBus
from causemesh.catalogue import Catalogue
from causemesh.checkpoints import CheckpointSettings, Encode
from causemesh.codec.decode import Decoder
from causemesh.codec.encode import RegistryEncoders
from causemesh.codec.registry import MemoryRegistry
from causemesh.positions import MemoryPositionStore
from causemesh.runner import Batch, Emission, Emitter, Limits, PartitionWorker, Stage

CATALOGUE = Catalogue.load()
INBOX = "inbox.requests"
STAGE = Stage("ingest", "ledger", (INBOX,))
_PAGES = 4


class Ledger:
    """Books positions: pages by position modulo 4, on each a list of positions, in order."""

    takes_bad_rows = True
    stateful = True

    def __init__(self, padding: int = 0) -> None:
        self.pages: list[list[int]] = [[] for _ in range(_PAGES)]
        self.told = 0
        self._new: list[int] | None = None
        self.swapped = False
        self._padding = " " * padding
        self.worker: PartitionWorker | None = None
        self.idle = 0

    async def process(
        self, batches: Sequence[Batch], watermark_us: int, transaction: Any
    ) -> Emission:
        for batch in batches:
            for at in batch.raw.positions.tolist():
                self.pages[at % _PAGES].append(at)
                if self._new is not None:
                    self._new.append(at)
        self.idle = 0 if batches else self.idle + 1
        if self.worker is not None and self.idle > 2:
            self.worker.stopping = True
        return Emission()

    def snapshot(self) -> bytes | None:
        return self._bytes({"pages": self.pages})()

    def restore(self, state: bytes | None) -> None:
        self.pages = [[] for _ in range(_PAGES)] if state is None else json.loads(state)["pages"]

    def pieces(self) -> Sequence[str]:
        return [f"page {number}" for number in range(_PAGES)]

    def piece(self, name: str) -> Encode:
        number = int(name.removeprefix("page "))
        return self._bytes({"page": number, "positions": list(self.pages[number])})

    def track(self) -> None:
        self._new = []
        self.swapped = False

    def swap(self) -> None:
        """What no delta can tell."""
        self.pages.reverse()
        self.swapped = True

    def replaced(self) -> bool:
        return self.swapped

    def delta(self) -> Encode:
        new, self._new = self._new, []
        return self._bytes({"new": new})

    def apply(self, body: bytes) -> None:
        told = json.loads(body)
        if "page" in told:
            self.pages[told["page"]] = told["positions"]
        else:
            for at in told["new"]:
                self.pages[at % _PAGES].append(at)

    def applied(self) -> None: ...

    def committed(self) -> None:
        self.told += 1

    def _bytes(self, told: dict[str, Any]) -> Encode:
        return (json.dumps(told) + self._padding).encode

    @property
    def booked(self) -> list[int]:
        return sorted(at for page in self.pages for at in page)


async def _moment(label: str) -> None:
    """Between any two steps other tasks and threads go on."""
    await asyncio.sleep(0.0002)


async def filled(count: int) -> MemoryBus:
    """A bus with so many records of one partition."""
    bus = MemoryBus(_moment)
    bus.create(INBOX, 1)
    await bus.producer("p").send([Outbound(INBOX, 0, [None] * count, [b"no record"] * count)])
    return bus


def worker_of(
    ledger: Ledger,
    bus: MemoryBus,
    store: MemoryPositionStore,
    settings: CheckpointSettings | None,
    kind: type[PartitionWorker] = PartitionWorker,
    **limits: Any,
) -> PartitionWorker:
    registry = MemoryRegistry()
    worker = kind(
        STAGE,
        0,
        ledger,
        bus=bus,
        store=store,
        catalogue=CATALOGUE,
        decoder=Decoder(registry),
        emitter=Emitter(CATALOGUE, RegistryEncoders(registry), bus.producer("w"), ()),
        clock=QuickClock(),
        limits=Limits(max_records=3, max_wait_s=0.0, **limits),
        checkpoints=settings,
    )
    ledger.worker = worker
    return worker


class QuickClock:
    """Time that moves on by itself, so that nothing has to rest."""

    def __init__(self) -> None:
        self._now = 0.0

    def now_us(self) -> int:
        return 0

    def monotonic(self) -> float:
        self._now += 100.0
        return self._now

    async def sleep(self, seconds: float) -> None: ...
