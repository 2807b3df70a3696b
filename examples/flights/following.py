"""Reads the outcomes as they come: progress for people, and the material of the checks."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import polars as pl

from causemesh.cli.context import Connections
from causemesh.errors import Retryable
from causemesh.log import Span

PREDICTIONS = "inference.predictions.v1"
_COLUMNS = (
    *("request_id", "tenant_id", "occurred_at", "model", "version"),
    *("outcome", "reason", "score", "vector", "event_id"),
)


class Outcomes:
    """Every distinct record of inference.predictions.v1, from the start, as it is written."""

    def __init__(self, open_to: Connections) -> None:
        self._open_to = open_to
        self._after: dict[tuple[str, int], int] = {}
        self._frames: list[pl.DataFrame] = []
        self.count = 0

    async def follow(self) -> None:
        """Read until cancelled. A broker that is away is waited for."""
        while True:
            with suppress(Retryable):
                await self.catch_up()
            await asyncio.sleep(0.5)

    async def catch_up(self) -> None:
        """Read up to the present ends.

        A record that was sent again after a crash comes with the event_id it had: see `frame`.
        """
        ends = await self._open_to.log.ends([PREDICTIONS])
        spans = {at: Span(self._after.get(at, -1), end.last) for at, end in ends.items()}
        async for batch in self._open_to.log.read(spans):
            self._frames.append(batch.frame.select(_COLUMNS))
            self.count += len(batch)
        self._after = {at: end.last for at, end in ends.items()}

    @property
    def frame(self) -> pl.DataFrame:
        """All outcomes so far, each once."""
        if not self._frames:
            return pl.DataFrame()
        joined = pl.concat(self._frames)
        self._frames = [joined.unique("event_id", keep="first", maintain_order=True)]
        return self._frames[0]
