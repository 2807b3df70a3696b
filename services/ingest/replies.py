"""The reply stream: outcomes handed to the API calls that wait for them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import structlog

from causemesh.bus.base import Bus, RawBatch
from causemesh.catalogue import Catalogue
from causemesh.clock import SystemClock
from causemesh.codec.base import BatchDecoder
from causemesh.periodic import repeat
from services.ingest.handlers import REJECTS

PREDICTIONS = "inference.predictions.v1"
_log = structlog.get_logger(__name__)
_WAIT_S = 5.0  # it returns as soon as something comes


@dataclass(frozen=True)
class Reply:
    """What became of a request: a row of `topic`."""

    topic: str
    row: dict[str, Any]


class Replies:
    """Follows predictions and rejects from their ends; decodes only what somebody waits for."""

    def __init__(self, bus: Bus, catalogue: Catalogue, decoder: BatchDecoder) -> None:
        self._bus = bus
        self._catalogue = catalogue
        self._decoder = decoder
        self._waiting: dict[tuple[str, str], asyncio.Future[Reply]] = {}

    def expect(self, tenant: str, request_id: str) -> asyncio.Future[Reply]:
        """A future for the request's outcome; ask before the request is sent."""
        future = asyncio.get_running_loop().create_future()
        self._waiting[(tenant, request_id)] = future
        future.add_done_callback(lambda _: self._waiting.pop((tenant, request_id), None))
        return future

    async def run(self) -> None:
        """Follow until cancelled."""
        await repeat("replies", self._follow, SystemClock(), 0.0)

    async def _follow(self) -> None:
        admin = self._bus.admin()
        try:
            ends = await admin.ends([PREDICTIONS, REJECTS])
        finally:
            await admin.close()
        reader = self._bus.reader(ends)
        try:
            while True:
                for raw in await reader.fetch(20_000, _WAIT_S):
                    if self._waiting:
                        await self._hand_out(raw)
        finally:
            await reader.close()

    async def _hand_out(self, raw: RawBatch) -> None:
        values = self._wanted(raw.values)
        if not values:
            return
        decoded = await self._decoder.decode(values, self._catalogue.topic(raw.topic).record)
        name = "request_id" if raw.topic == PREDICTIONS else "claimed_id"
        for row in decoded.frame.iter_rows(named=True):
            future = self._waiting.get((row["tenant_id"], row[name]))
            if future is not None and not future.done():
                future.set_result(Reply(raw.topic, row))

    def _wanted(self, values: Sequence[bytes | None]) -> list[bytes]:
        """Values that hold an id somebody waits for: at full speed nearly none does."""
        ids = [request_id.encode() for _, request_id in self._waiting]
        return [value for value in values if value and any(one in value for one in ids)]
