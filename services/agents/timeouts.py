"""Ends reviews that nobody answered, by event time."""

from __future__ import annotations

import structlog

from causemesh.clock import Clock
from causemesh.periodic import repeat
from causemesh.positions_sql import SqlPositionStore
from services.agents.decisions import Decisions

_log = structlog.get_logger(__name__)


class TimeOuts:
    """Follows the committed watermark of the whole group; any number of processes may run one."""

    def __init__(
        self,
        decisions: Decisions,
        store: SqlPositionStore,
        *,
        group: str,
        partitions: int,
        clock: Clock,
        every_s: float,
    ) -> None:
        self._decisions = decisions
        self._store = store
        self._group = group
        self._partitions = partitions
        self._clock = clock
        self._every_s = every_s

    async def run(self) -> None:
        """Time out until cancelled."""
        await repeat("time_outs", self.step, self._clock, self._every_s)

    async def step(self) -> int:
        """Time out once; returns how many reviews ended. Raises Retryable."""
        watermark_us = await self._store.watermark(self._group, self._partitions)
        return 0 if watermark_us is None else await self._decisions.time_out(watermark_us)
