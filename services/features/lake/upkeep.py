"""Upkeep beside the writer: every table, one after the other, every so often."""

from __future__ import annotations

import asyncio

import structlog
from pyiceberg.catalog import Catalog

from causemesh.clock import Clock
from causemesh.lake.definitions import LakeDefinition, TableDefinition
from causemesh.lake.opening import away
from causemesh.lake.tables import load
from causemesh.lake.upkeep import UpkeepLimits, compact, expire, retain, sweep
from causemesh.periodic import repeat

_log = structlog.get_logger(__name__)


class Keeper:
    """Compacts, retains, expires and sweeps; any number of processes may do so at once."""

    def __init__(
        self, catalog: Catalog, definition: LakeDefinition, clock: Clock, every_s: float
    ) -> None:
        self._catalog = catalog
        self._tables = list(definition.tables.values())
        self._clock = clock
        self._every_s = every_s
        self._limits = UpkeepLimits()

    async def run(self) -> None:
        """Until cancelled."""
        await self._clock.sleep(self._every_s)
        await repeat("lake_upkeep", self._all, self._clock, self._every_s)

    async def _all(self) -> None:
        for table in self._tables:
            await asyncio.to_thread(self._keep, table)

    def _keep(self, definition: TableDefinition) -> None:
        name = definition.identifier
        with away():
            if load(self._catalog, name) is None:
                return
        retained = retain(self._catalog, definition)
        compacted = compact(self._catalog, name, self._limits)
        expired = expire(self._catalog, name, self._limits)
        swept = sweep(self._catalog, name, self._limits)
        if retained or compacted.partitions or expired or swept:
            _log.info(
                "lake_kept",
                table=name,
                records_retired=retained,
                files_before=compacted.files_before,
                files_after=compacted.files_after,
                snapshots_expired=expired,
                orphans_removed=swept,
            )
