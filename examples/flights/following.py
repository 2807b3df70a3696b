"""Reads the outcomes as they come: progress for people, and the material of the checks."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import polars as pl

from causemesh.bus.base import BEFORE_FIRST, Admin, RawBatch, Reader, TopicPartition
from causemesh.cli.context import Connections
from causemesh.errors import Retryable

PREDICTIONS = "inference.predictions.v1"
_COLUMNS = (
    *("request_id", "tenant_id", "occurred_at", "model", "version"),
    *("outcome", "reason", "score", "vector", "event_id"),
)
_FETCH = 20_000
_WAIT_S = 0.5


class Outcomes:
    """Every distinct record of inference.predictions.v1, from the start, as it is written.

    Its connections stay open between two looks; a lost one is opened again. `close` ends them.
    """

    def __init__(self, open_to: Connections) -> None:
        self._open_to = open_to
        self._after: dict[TopicPartition, int] = {}
        self._admin: Admin | None = None
        self._reader: Reader | None = None
        self._frames: list[pl.DataFrame] = []
        self.count = 0

    async def follow(self) -> None:
        """Read until cancelled. A broker that is away is waited for."""
        try:
            while True:
                with suppress(Retryable):
                    await self.catch_up()
                await asyncio.sleep(0.5)
        finally:
            await self.close()

    async def catch_up(self) -> None:
        """Read up to the present ends.

        A record that was sent again after a crash comes with the event_id it had: see `frame`.
        """
        try:
            await self._read_on()
        except BaseException:
            await self.close()  # whatever was lost, the next look opens it again
            raise

    async def _read_on(self) -> None:
        if self._admin is None:
            self._admin = self._open_to.bus.admin()
        ends = await self._admin.ends([PREDICTIONS])
        after = {at: self._after.get(at, BEFORE_FIRST) for at in ends}
        if self._reader is None or after.keys() != self._after.keys():
            await self._stop_reading()
            self._reader = self._open_to.bus.reader(after)
            self._after = after
        while any(self._after[at] < end for at, end in ends.items()):
            for raw in await self._reader.fetch(_FETCH, _WAIT_S):
                await self._take(raw)

    async def _take(self, raw: RawBatch) -> None:
        record = self._open_to.catalogue.topic(PREDICTIONS).record
        decoded = await self._open_to.decoder.decode_log(raw, record)
        if decoded.frame.height:
            self._frames.append(decoded.frame.select(_COLUMNS))
            self.count += decoded.frame.height
        self._after[(raw.topic, raw.partition)] = int(raw.positions[-1])

    async def close(self) -> None:
        """Close the connections; what was read stays."""
        await self._stop_reading()
        if self._admin is not None:
            admin, self._admin = self._admin, None
            await admin.close()

    async def _stop_reading(self) -> None:
        if self._reader is not None:
            reader, self._reader = self._reader, None
            await reader.close()

    @property
    def frame(self) -> pl.DataFrame:
        """All outcomes so far, each once."""
        if not self._frames:
            return pl.DataFrame()
        joined = pl.concat(self._frames)
        self._frames = [joined.unique("event_id", keep="first", maintain_order=True)]
        return self._frames[0]
