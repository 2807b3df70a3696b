"""Single records from JSON-like rows, for the edges of the mesh (REST, command line, SDK)."""

from __future__ import annotations

import io
from collections.abc import Mapping
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any

import fastavro

from causemesh.codec.wire import header

Schema = Mapping[str, Any]


class RowEncoder:
    """Encodes one record at a time; also the schemas that are not columnar."""

    def __init__(self, schema: Schema, schema_id: int) -> None:
        self._schema = schema
        self._header = header(schema_id)
        self._parsed = fastavro.parse_schema(dict(schema))

    def encode(self, row: Mapping[str, Any]) -> bytes:
        """One framed value. Raises ValueError saying which field does not fit."""
        stream = io.BytesIO()
        fitted = fit(self._schema, row)
        try:
            fastavro.schemaless_writer(stream, self._parsed, fitted, strict=True)
        except Exception as error:
            raise ValueError(f"does not fit {self._schema['name']}: {error}"[:300]) from error
        return self._header + stream.getvalue()


def fit(record: Schema, row: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON row as the values that Avro takes: instants from ISO 8601 text or microseconds.

    Fields with a default may be missing. Raises ValueError naming the field that is missing,
    unknown or of the wrong form.
    """
    known = {field["name"] for field in record["fields"]}
    unknown = sorted(set(row) - known)
    if unknown:
        raise ValueError(f"unknown fields {unknown}; known: {sorted(known)}")
    fitted = {}
    for field in record["fields"]:
        name = field["name"]
        if name not in row and "default" not in field and not _optional(field["type"]):
            raise ValueError(f"{name} is missing")
        value = row.get(name, field.get("default"))
        try:
            fitted[name] = _value(field["type"], value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}: {error}") from error
    return fitted


def _optional(avro: Any) -> bool:
    return isinstance(avro, list) and "null" in avro


def _value(avro: Any, value: Any) -> Any:
    if isinstance(avro, list):
        return _branch(avro, value)
    if value is None and avro != "null":
        raise ValueError("must not be null")
    if isinstance(avro, str):
        return _primitive(avro, value)
    if "logicalType" in avro:
        return _logical(avro, value)
    return _nested(avro, value)


def _branch(union: list[Any], value: Any) -> Any:
    if value is None and "null" in union:
        return None
    branches = [branch for branch in union if branch != "null"]
    return _value(branches[0], value) if len(branches) == 1 else value


def _logical(avro: Mapping[str, Any], value: Any) -> Any:
    logical = avro["logicalType"]
    if logical.startswith("timestamp"):
        return _instant(value, 1_000_000 if logical.endswith("micros") else 1_000)
    if logical == "date":
        return date.fromisoformat(value) if isinstance(value, str) else value
    return Decimal(str(value)) if logical == "decimal" else value


def _nested(avro: Mapping[str, Any], value: Any) -> Any:
    kind = avro["type"]
    if kind == "record":
        return fit(avro, value)
    if kind == "array":
        return [_value(avro["items"], item) for item in value]
    if kind == "map":
        return {key: _value(avro["values"], item) for key, item in value.items()}
    return _primitive(kind, value) if isinstance(kind, str) else _value(kind, value)


_PYTHON: dict[str, tuple[type, ...]] = {
    "boolean": (bool,),
    "int": (int,),
    "long": (int,),
    "float": (int, float),
    "double": (int, float),
    "string": (str,),
}


def _primitive(kind: str, value: Any) -> Any:
    wrong = kind in _PYTHON and not isinstance(value, _PYTHON[kind])
    if wrong or (kind != "boolean" and isinstance(value, bool)):
        raise ValueError(f"{value!r} is no {kind}")
    return value


def _instant(value: Any, per_second: int) -> datetime | int:
    if isinstance(value, datetime):
        return value if value.tzinfo else value.replace(tzinfo=UTC)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no instant; write ISO 8601 or 1/{per_second} s")
    read = datetime.fromisoformat(value)
    return read if read.tzinfo else read.replace(tzinfo=UTC)
