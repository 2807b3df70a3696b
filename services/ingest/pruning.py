"""Forgets ids that no event can repeat any more."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import structlog

from causemesh.catalogue import Catalogue
from causemesh.clock import Clock
from causemesh.periodic import repeat
from causemesh.positions_sql import SqlPositionStore
from services.ingest.domain import Rules
from services.ingest.handlers import progress_of
from services.ingest.store import IdStore

_log = structlog.get_logger(__name__)
_EVERY_S = 600.0
_DAY_US = 86_400_000_000


class Pruner:
    """Every ten minutes drops ids a day past the window, by each inbox's own present."""

    def __init__(
        self,
        ids: IdStore,
        store: SqlPositionStore,
        *,
        catalogue: Catalogue,
        group: str,
        inboxes: Sequence[str],
        rules: Rules,
        clock: Clock,
    ) -> None:
        self._ids = ids
        self._store = store
        self._catalogue = catalogue
        self._group = group
        self._inboxes = inboxes
        self._rules = rules
        self._clock = clock

    async def run(self) -> None:
        """Prune until cancelled."""
        await repeat("pruning", self.prune, self._clock, _EVERY_S)

    async def prune(self) -> int:
        """Prune once; returns how many ids were dropped."""
        dropped = 0
        for inbox in self._inboxes:
            now_us = await self._present(inbox)
            if now_us is not None:
                dropped += await self._ids.forget(inbox, now_us - self._rules.window_us - _DAY_US)
            await asyncio.sleep(0)
        return dropped

    async def _present(self, inbox: str) -> int | None:
        if progress_of(self._catalogue, inbox).watermark == "clock":
            return self._clock.now_us()
        return await self._store.promised(
            self._group, inbox, self._catalogue.topic(inbox).partitions
        )
