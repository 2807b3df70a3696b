"""SQL over the lake: DuckDB on the live files of each table, nothing copied.

A table is there as zone.name. Its files are known from its newest snapshot, each with the tenant
and day that it holds, so a query that names those opens no other files.
"""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from pyiceberg.io.pyarrow import PyArrowFileIO, schema_to_pyarrow
from pyiceberg.manifest import DataFile
from pyiceberg.table import Table

from causemesh.errors import Misdeclared
from causemesh.lake.reading import Lake

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_LAST_DAY = (datetime(9999, 12, 31, tzinfo=UTC) - _EPOCH).days


def query(lake: Lake, text: str, *, at: datetime | None = None) -> pa.Table:
    """The answer to one statement, over the tables as they are now, or were at an instant.

    Raises Misdeclared with what is wrong with the statement.
    """
    with duckdb.connect() as connection:
        for definition, table in lake.tables():
            files = dataset(table, at)
            if files is not None:
                name = f"{definition.zone}__{definition.name}"
                connection.register(name, files)
                connection.execute(f"CREATE SCHEMA IF NOT EXISTS {definition.zone}")
                connection.execute(
                    f'CREATE VIEW {definition.zone}."{definition.name}" AS SELECT * FROM "{name}"'
                )
        try:
            return connection.sql(text).to_arrow_table()
        except duckdb.Error as error:
            raise Misdeclared(f"{error}") from None


def rows_of(answer: pa.Table) -> list[dict[str, Any]]:
    """An answer's rows, whole decimals as integers: DuckDB's sum of integers is one."""
    return [{name: _number(value) for name, value in row.items()} for row in answer.to_pylist()]


def _number(value: Any) -> Any:
    whole = isinstance(value, Decimal) and value == value.to_integral_value()
    return int(value) if whole else value


def dataset(table: Table, at: datetime | None = None) -> ds.Dataset | None:
    """A table's live files as an Arrow dataset; None when it was not there at that instant."""
    snapshot = table.current_snapshot()
    if at is not None:
        snapshot = table.snapshot_as_of_timestamp(round(at.timestamp() * 1000))
    if snapshot is None:
        return None
    schema = schema_to_pyarrow(table.schema(), include_field_ids=False)
    tasks = table.scan(snapshot_id=snapshot.snapshot_id).plan_files()
    files = [task.file for task in tasks]
    if not files:
        return ds.dataset(schema.empty_table())
    io = table.io
    if not isinstance(io, PyArrowFileIO):
        raise Misdeclared("the lake's files are read by pyarrow; leave py-io-impl as it is")
    scheme, netloc, _ = PyArrowFileIO.parse_location(files[0].file_path, io.properties)
    paths = [PyArrowFileIO.parse_location(one.file_path, io.properties)[2] for one in files]
    return ds.FileSystemDataset.from_paths(
        paths,
        schema=schema,
        format=ds.ParquetFileFormat(),
        filesystem=io.fs_by_scheme(scheme, netloc),
        partitions=[_holds(one) for one in files],
    )


def _holds(file: DataFile) -> ds.Expression:
    """What is true of every row of a file: its tenant and its day."""
    tenant, day = file.partition[0], file.partition[1]
    known = pc.field("tenant_id") == pa.scalar(tenant, pa.large_string())
    start = pa.scalar(day * 86_400_000_000, pa.timestamp("us", "UTC"))
    known &= pc.field("occurred_at") >= start
    if day < _LAST_DAY:
        end = pa.scalar((day + 1) * 86_400_000_000, pa.timestamp("us", "UTC"))
        known &= pc.field("occurred_at") < end
    return known
