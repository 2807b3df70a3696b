"""Reading the lake: by topic, event type or table, tenant, time range and snapshot; lazily."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self, cast

import polars as pl
import pyarrow as pa
from pyiceberg.catalog import Catalog
from pyiceberg.expressions import (
    AlwaysTrue,
    And,
    BooleanExpression,
    EqualTo,
    GreaterThanOrEqual,
    LessThan,
    LiteralPredicate,
)
from pyiceberg.table import DataScan, Table

from causemesh.catalogue import Catalogue
from causemesh.errors import Misdeclared
from causemesh.lake.definitions import LakeDefinition, TableDefinition, define_lake
from causemesh.lake.opening import away, open_catalog
from causemesh.lake.progress import TableProgress, progress_in, progress_of
from causemesh.lake.settings import LakeSettings
from causemesh.lake.tables import load

# polars would plan scans with a plug-in that we don't have, and warn that it can't
os.environ.setdefault("POLARS_ICEBERG_PLANNER", "pyiceberg")


@dataclass(frozen=True)
class Selection:
    """Rows of one table at one snapshot, not read yet. `since` is inclusive, `until` exclusive."""

    table: Table
    snapshot_id: int | None
    tenant: str | None = None
    since: datetime | None = None
    until: datetime | None = None
    columns: tuple[str, ...] | None = None

    def lazy(self) -> pl.LazyFrame:
        """As a Polars query; filters and columns added to it reach the files."""
        options = dict(self.table.io.properties)
        if options.get("s3.endpoint", "").startswith("http://"):
            options["allow_http"] = "true"
        frame = pl.scan_iceberg(self.table, snapshot_id=self.snapshot_id, storage_options=options)
        if self.tenant is not None:
            frame = frame.filter(pl.col("tenant_id") == self.tenant)
        if self.since is not None:
            frame = frame.filter(pl.col("occurred_at") >= self.since)
        if self.until is not None:
            frame = frame.filter(pl.col("occurred_at") < self.until)
        return frame if self.columns is None else frame.select(self.columns)

    def batches(self) -> pa.RecordBatchReader:
        """As Arrow record batches, read one by one."""
        return self.scan().to_arrow_batch_reader()

    def count(self) -> int:
        """How many rows, by the tables' own counts where a file matches whole."""
        return self.scan().count()

    def scan(self) -> DataScan:
        """As a pyiceberg scan: its tasks are the files that can hold such rows."""
        return self.table.scan(
            row_filter=self._filter(),
            selected_fields=self.columns or ("*",),
            snapshot_id=self.snapshot_id,
        )

    def _filter(self) -> BooleanExpression:
        asked: list[tuple[type[LiteralPredicate], str, Any]] = [
            (EqualTo, "tenant_id", self.tenant),
            (GreaterThanOrEqual, "occurred_at", self.since and self.since.isoformat()),
            (LessThan, "occurred_at", self.until and self.until.isoformat()),
        ]
        wanted: BooleanExpression = AlwaysTrue()
        for kind, column, value in asked:
            if value is not None:
                wanted = And(wanted, cast(Any, kind)(column, value))
        return wanted


class Lake:
    """The lake of one mesh. Tables are opened as they are at the call."""

    def __init__(self, catalog: Catalog, definition: LakeDefinition) -> None:
        self.catalog = catalog
        self.definition = definition

    @classmethod
    def open(cls, settings: LakeSettings, catalogue: Catalogue, project: Path | None) -> Lake:
        """The lake of a catalogue and a project. Raises Misdeclared, Retryable."""
        return cls(open_catalog(settings), define_lake(catalogue, project))

    def close(self) -> None:
        """Close the catalog's connections."""
        self.catalog.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def select(
        self,
        name: str,
        *,
        tenant: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        snapshot_id: int | None = None,
        columns: Sequence[str] | None = None,
    ) -> Selection:
        """Rows of a table, a topic or an event type, of the newest snapshot unless one is named.

        Raises Misdeclared for an unknown name, a table without records yet, an unknown snapshot.
        """
        table = self.table(name)
        known = snapshot_id is None or table.snapshot_by_id(snapshot_id) is not None
        if not known:
            raise Misdeclared(f"{name} has no snapshot {snapshot_id}: it may have expired")
        if snapshot_id is None and (now := table.current_snapshot()) is not None:
            snapshot_id = now.snapshot_id  # the same rows, however often it is read
        return Selection(
            table,
            snapshot_id,
            tenant,
            _utc(since),
            _utc(until),
            tuple(columns) if columns else None,
        )

    def table(self, name: str) -> Table:
        """The Iceberg table. Raises Misdeclared when nothing was written to it yet."""
        wanted = self.definition.table(name)
        table = self._load(wanted)
        if table is None:
            raise Misdeclared(f"{wanted.identifier} is not there yet; nothing was written to it")
        return table

    def tables(self) -> Iterator[tuple[TableDefinition, Table]]:
        """Every table that is there."""
        for definition in self.definition.tables.values():
            table = self._load(definition)
            if table is not None:
                yield definition, table

    def progress(self, name: str, snapshot_id: int | None = None) -> TableProgress:
        """How far a table holds its topic: positions, and the watermark below which it is whole."""
        table = self.table(name)
        if snapshot_id is None:
            return progress_of(table.metadata)
        snapshot = table.snapshot_by_id(snapshot_id)
        found = progress_in(snapshot) if snapshot is not None else None
        if found is None:
            raise Misdeclared(f"snapshot {snapshot_id} of {name} says nothing of positions")
        return found

    def snapshots(self, name: str) -> list[dict[str, Any]]:
        """A row a snapshot, the oldest first."""
        return [
            {
                "snapshot_id": one.snapshot_id,
                "committed_at": datetime.fromtimestamp(one.timestamp_ms / 1e3, UTC),
                "operation": str(one.summary.operation.value) if one.summary else "",
                "added": int(_told(one, "added-records")),
                "removed": int(_told(one, "deleted-records")),
                "records": int(_told(one, "total-records")),
                "files": int(_told(one, "total-data-files")),
            }
            for one in self.table(name).snapshots()
        ]

    def overview(self) -> list[dict[str, Any]]:
        """A row a table: its records, files, bytes, snapshots and how far it is whole."""
        return [_row(definition, table) for definition, table in self.tables()]

    def _load(self, definition: TableDefinition) -> Table | None:
        with away():
            return load(self.catalog, definition.identifier)


def _row(definition: TableDefinition, table: Table) -> dict[str, Any]:
    now = table.current_snapshot()
    whole_us = progress_of(table.metadata).watermark_us()
    return {
        "table": definition.identifier,
        "topic": definition.topic,
        "records": int(_told(now, "total-records")),
        "files": int(_told(now, "total-data-files")),
        "bytes": int(_told(now, "total-files-size")),
        "snapshots": len(table.metadata.snapshots),
        "whole_before": None if whole_us is None else _instant(whole_us),
    }


def _utc(at: datetime | None) -> datetime | None:
    return at if at is None or at.tzinfo else at.replace(tzinfo=UTC)


def _instant(at_us: int) -> datetime | None:
    try:
        return datetime.fromtimestamp(at_us / 1e6, UTC)
    except (OverflowError, ValueError):  # a replay's end of time
        return None


def _told(snapshot: Any, name: str) -> str:
    told = snapshot.summary.additional_properties if snapshot and snapshot.summary else {}
    return str(told.get(name, 0))
