"""Columns to framed values: by columns, or by rows where that is quicker or the only way."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any, Literal

import fastavro
import polars as pl

from causemesh.codec.base import BatchEncoder
from causemesh.codec.columnar_conform import Conformer, MisfitError
from causemesh.codec.columnar_pieces import constant
from causemesh.codec.columnar_plan import NotColumnarError, record_plan
from causemesh.codec.registry import Registry
from causemesh.codec.wire import header

# Below it the fixed cost of the columns is above that of so many rows (benchmarks/codec.py).
FEW_ROWS = 128
_INSTANTS: dict[Any, Literal["us", "ms"]] = {"timestamp-micros": "us", "timestamp-millis": "ms"}


class Encoder:
    """Encodes frames of one record under one schema id."""

    def __init__(self, schema: Mapping[str, Any], schema_id: int) -> None:
        self._rows = RowwiseEncoder(schema, schema_id)
        try:
            self._columns: ColumnwiseEncoder | None = ColumnwiseEncoder(schema, schema_id)
        except NotColumnarError:
            self._columns = None
        # fastavro takes a null for false where a boolean is required.
        self._rows_are_strict = not _has_required_boolean(schema)

    def encode(self, frame: pl.DataFrame) -> list[bytes]:
        """One framed value a row.

        Raises ValueError naming the first row that does not fit the schema, and its column.
        """
        if self._columns is None:
            return self._rows.encode(frame)
        try:
            return self._conformed(self._columns, self._columns.conform(frame))
        except MisfitError as misfit:
            if misfit.row:
                # Columns are checked one by one: a later one may be wrong on an earlier row.
                self.encode(frame.head(misfit.row))
            raise

    def _conformed(self, columns: ColumnwiseEncoder, frame: pl.DataFrame) -> list[bytes]:
        if frame.height < FEW_ROWS and self._rows_are_strict:
            try:
                return self._rows.encode(frame)
            except ValueError:
                # The columns decide, and name the column: whether a row is refused must not
                # depend on how many came with it.
                return columns.encode(frame)
        return columns.encode(frame)


class RowwiseEncoder:
    """Row by row, with fastavro: any schema."""

    def __init__(self, schema: Mapping[str, Any], schema_id: int) -> None:
        self._header = header(schema_id)
        self._names = [field["name"] for field in schema["fields"]]
        # Instants go as integers: building a datetime a record would cost more than encoding it.
        self._units = {f["name"]: unit for f in schema["fields"] if (unit := _unit(f["type"]))}
        fields = [
            {**field, "type": _bare_instant(field["type"])}
            if field["name"] in self._units
            else field
            for field in schema["fields"]
        ]
        self._parsed = fastavro.parse_schema({**schema, "fields": fields})

    def encode(self, frame: pl.DataFrame) -> list[bytes]:
        """One framed value a row; raises ValueError naming the row that does not fit the schema."""
        stream = io.BytesIO()
        ends: list[int] = []
        columns = [self._values(frame.get_column(name)) for name in self._names]
        for row in zip(*columns, strict=True):
            try:
                named = dict(zip(self._names, row, strict=True))
                fastavro.schemaless_writer(stream, self._parsed, named)
            except Exception as error:
                raise ValueError(f"row {len(ends)} does not fit its schema: {error!r}") from error
            ends.append(stream.tell())
        joined = stream.getvalue()
        starts = [0, *ends[:-1]]
        return [self._header + joined[a:b] for a, b in zip(starts, ends, strict=True)]

    def _values(self, column: pl.Series) -> list[Any]:
        if isinstance(column.dtype, pl.Datetime) and column.name in self._units:
            column = column.cast(pl.Datetime(self._units[column.name])).cast(pl.Int64)
        return column.to_list()


class ColumnwiseEncoder:
    """By columns: the columnar subset of Avro. Raises NotColumnarError for another schema."""

    def __init__(self, schema: Mapping[str, Any], schema_id: int) -> None:
        self._plan = record_plan(schema)
        self._conformer = Conformer(schema)
        self._header = constant(header(schema_id))

    def conform(self, frame: pl.DataFrame) -> pl.DataFrame:
        """The record's columns with their types; raises ValueError naming column and row."""
        return self._conformer.conform(frame)

    def encode(self, frame: pl.DataFrame) -> list[bytes]:
        """One framed value a row of a conformed frame; raises ValueError naming column and row."""
        if not frame.height:
            return []
        data, ends = self._plan.encode(frame, [self._header])
        joined, stops = data.tobytes(), ends.tolist()
        starts = [0, *stops[:-1]]
        return [joined[a:b] for a, b in zip(starts, stops, strict=True)]


class RegistryEncoders:
    """Makes encoders, registering each schema under its subject (idempotent at the registry)."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    async def encoder(self, subject: str, schema: Mapping[str, Any]) -> BatchEncoder:
        """See `EncoderFactory.encoder`."""
        return Encoder(schema, await self._registry.register(subject, schema))


def _unit(avro: Any) -> Any:
    """The polars unit of an instant, nullable or not."""
    branches = avro if isinstance(avro, list) else [avro]
    units = (_INSTANTS.get(b.get("logicalType")) for b in branches if isinstance(b, dict))
    return next((unit for unit in units if unit), None)


def _bare_instant(avro: Any) -> Any:
    if isinstance(avro, list):
        return [_bare_instant(branch) for branch in avro]
    return "long" if isinstance(avro, dict) and avro.get("logicalType") in _INSTANTS else avro


def _has_required_boolean(avro: Any) -> bool:
    """Whether fastavro would take a null for false somewhere in a value of this type."""
    if isinstance(avro, list):
        return any(_has_required_boolean(branch) for branch in avro if branch != "boolean")
    if isinstance(avro, str):
        return avro == "boolean"
    inner = [field["type"] for field in avro.get("fields", [])]
    kept = [*inner, avro.get("items", "null"), avro["type"]]
    return any(_has_required_boolean(each) for each in kept)
