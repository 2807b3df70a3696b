"""Rejects read back from their topic, and sent through the door again."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import polars as pl

from causemesh.bus.base import Outbound, Producer
from causemesh.catalogue import Catalogue
from causemesh.client import outbound
from causemesh.log import LogReader
from services.ingest.handlers import REJECTS


@dataclass(frozen=True)
class RejectFilter:
    """Which rejects are meant; None means any."""

    reason: str | None = None
    tenant_id: str | None = None
    event_ids: frozenset[str] | None = None

    def apply(self, frame: pl.DataFrame) -> pl.DataFrame:
        """The rows that are meant."""
        if self.reason is not None:
            frame = frame.filter(pl.col("reason") == self.reason)
        if self.tenant_id is not None:
            frame = frame.filter(pl.col("tenant_id") == self.tenant_id)
        if self.event_ids is not None:
            frame = frame.filter(pl.col("claimed_id").is_in(list(self.event_ids)))
        return frame


class Rejects:
    """What lies in ingest.rejects.v1."""

    def __init__(self, log: LogReader, catalogue: Catalogue, producer: Producer) -> None:
        self._log = log
        self._catalogue = catalogue
        self._producer = producer

    async def newest(self, chosen: RejectFilter, limit: int) -> list[dict[str, Any]]:
        """The newest `limit` rejects, newest first, bytes in base64."""
        kept: pl.DataFrame | None = None
        async for frame in self._frames(chosen):
            both = frame if kept is None else pl.concat([kept, frame])
            kept = both.sort("occurred_at", descending=True).head(limit)
        rows = [] if kept is None else kept.to_dicts()
        for row in rows:
            for name in ("original_key", "original_value"):
                value = row[name]
                row[name] = None if value is None else base64.b64encode(value).decode()
        return rows

    async def replay(self, chosen: RejectFilter, *, dry_run: bool = False) -> int:
        """Write the original bytes to their inbox topics again; returns how many.

        What was refused again lands in the rejects once more. A reject without its bytes (it was
        too large, or a tombstone) stays where it is.
        """
        count = 0
        async for found in self._frames(chosen):
            frame = found.filter(pl.col("original_value").is_not_null())
            count += frame.height
            if frame.height and not dry_run:
                await self._producer.send(self._originals(frame))
        return count

    async def _frames(self, chosen: RejectFilter) -> AsyncIterator[pl.DataFrame]:
        async for batch in self._log.read(await self._log.ends([REJECTS])):
            frame = chosen.apply(batch.frame)
            if frame.height:
                yield frame

    def _originals(self, frame: pl.DataFrame) -> list[Outbound]:
        sends: list[Outbound] = []
        inboxes = frame.with_columns(pl.col("cause").struct.field("topic").alias("inbox"))
        for (inbox,), part in inboxes.group_by("inbox", maintain_order=True):
            topic = self._catalogue.topic(str(inbox))
            keys, values = (part[f"original_{name}"].to_list() for name in ("key", "value"))
            sends += outbound(topic, keys, values)
        return sends
