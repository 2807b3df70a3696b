"""Parquet files of a table, one a tenant and day.

pyiceberg's `write_file` does the same, and works out the table's schema, its conversion and its
statistics plan anew for every file: 5.5 ms where this takes a fraction. A replay writes thousands
of small files, so that counts; all rules are pyiceberg's own, from the same functions.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from pyiceberg.io.pyarrow import (
    compute_statistics_plan,
    data_file_statistics_from_parquet_metadata,
    parquet_path_to_id_mapping,
    schema_to_pyarrow,
)
from pyiceberg.manifest import DataFile, DataFileContent, FileFormat
from pyiceberg.partitioning import PartitionFieldValue, PartitionKey
from pyiceberg.table import Table

_DAY = "__day"
_TENANT = "tenant_id"
_ROW_GROUP = 1 << 20


class FileWriter:
    """Writes rows as data files of a table as it is now."""

    def __init__(self, table: Table) -> None:
        self._table = table
        self._schema = table.schema()
        self._columns: pa.Schema = schema_to_pyarrow(self._schema, include_field_ids=True)
        self._statistics = compute_statistics_plan(self._schema, table.metadata.properties)
        self._ids = parquet_path_to_id_mapping(self._schema)
        self._locations = table.location_provider()
        self._wrote = uuid.uuid4()

    def write(self, frame: pl.DataFrame) -> list[DataFile]:
        """The rows as files; nobody sees them before a commit."""
        day = pl.col("occurred_at").dt.date().to_physical().alias(_DAY)
        ordered = frame.with_columns(day).sort(_TENANT, _DAY, maintain_order=True)
        parts = ordered.group_by(_TENANT, _DAY, maintain_order=True).len()
        rows = self._fitted(ordered.drop(_DAY).rechunk().to_arrow())
        return [
            self._file(number, key, rows.slice(start, count))
            for number, (key, start, count) in enumerate(self._keys(parts))
        ]

    def _keys(self, parts: pl.DataFrame) -> Iterator[tuple[PartitionKey, int, int]]:
        spec, start = self._table.spec(), 0
        tenant_field, day_field = spec.fields
        for tenant, day, count in parts.iter_rows():
            values = [
                PartitionFieldValue(tenant_field, tenant),
                PartitionFieldValue(day_field, day),
            ]
            yield PartitionKey(values, spec, self._schema), start, count
            start += count

    def _fitted(self, rows: pa.Table) -> pa.Table:
        """The table's columns in its order; what the rows lack is null."""
        columns = [
            rows.column(field.name).cast(field.type)
            if field.name in rows.column_names
            else pa.nulls(rows.num_rows, field.type)
            for field in self._columns
        ]
        return pa.Table.from_arrays(columns, schema=self._columns)

    def _file(self, number: int, key: PartitionKey, rows: pa.Table) -> DataFile:
        path = self._locations.new_data_location(f"{number:05}-{self._wrote}.parquet", key)
        output = self._table.io.new_output(path)
        with (
            output.create(overwrite=True) as stream,
            pq.ParquetWriter(
                stream, self._columns, compression="zstd", store_decimal_as_integer=True
            ) as writer,
        ):
            writer.write_table(rows, row_group_size=_ROW_GROUP)
        told = data_file_statistics_from_parquet_metadata(
            writer.writer.metadata, self._statistics, self._ids
        )
        return DataFile.from_args(
            content=DataFileContent.DATA,
            file_path=path,
            file_format=FileFormat.PARQUET,
            partition=key.partition,
            file_size_in_bytes=len(output),
            sort_order_id=None,
            spec_id=self._table.metadata.default_spec_id,
            equality_ids=None,
            key_metadata=None,
            **told.to_serialized_dict(),
        )
