"""Single records from JSON-like rows, for the edges of the mesh (REST, command line, SDK)."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime
from decimal import Decimal, InvalidOperation
from typing import Any

import fastavro

from causemesh.codec.wire import header

Schema = Mapping[str, Any]
_SHOWN = 200


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
    if not isinstance(row, Mapping):
        raise ValueError(f"{row!r} is no object of fields"[:_SHOWN])
    known = {field["name"] for field in record["fields"]}
    unknown = sorted(map(str, set(row) - known))
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
        return _day(value)
    return _decimal(value) if logical == "decimal" else value


def _nested(avro: Mapping[str, Any], value: Any) -> Any:
    kind = avro["type"]
    if kind == "record":
        return fit(avro, value)
    if kind == "array":
        return [_value(avro["items"], item) for item in _listed(value)]
    if kind == "map":
        return {key: _value(avro["values"], item) for key, item in _mapped(value).items()}
    if kind == "enum" and value not in avro["symbols"]:
        raise ValueError(f"{value!r} is none of {avro['symbols']}"[:_SHOWN])
    return _primitive(kind, value) if isinstance(kind, str) else _value(kind, value)


def _listed(value: Any) -> Sequence[Any]:
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{value!r} is no list"[:_SHOWN])
    return value


def _mapped(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{value!r} is no object"[:_SHOWN])
    return value


_PYTHON: dict[str, tuple[type, ...]] = {
    "boolean": (bool,),
    "int": (int,),
    "long": (int,),
    "float": (int, float),
    "double": (int, float),
    "string": (str,),
}
_BITS = {"int": 31, "long": 63}


def _primitive(kind: str, value: Any) -> Any:
    wrong = kind in _PYTHON and not isinstance(value, _PYTHON[kind])
    if wrong or (kind != "boolean" and isinstance(value, bool)):
        raise ValueError(f"{value!r} is no {kind}"[:_SHOWN])
    if kind in _BITS and not -(1 << _BITS[kind]) <= value < 1 << _BITS[kind]:
        # fastavro writes an int of any size, and no reader takes it for an int any more.
        raise ValueError(f"{value} does not fit {kind}")
    return value


def _day(value: Any) -> date:
    if isinstance(value, str):
        return date.fromisoformat(value)
    if not isinstance(value, date):
        raise ValueError(f"{value!r} is no date; write YYYY-MM-DD")
    return value


def _decimal(value: Any) -> Decimal:
    try:
        return Decimal(str(value))
    except InvalidOperation:
        raise ValueError(f"{value!r} is no decimal") from None


def _instant(value: Any, per_second: int) -> datetime | int:
    if isinstance(value, datetime):
        return value if value.tzinfo else value.replace(tzinfo=UTC)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no instant; write ISO 8601 or 1/{per_second} s")
    read = datetime.fromisoformat(value)
    return read if read.tzinfo else read.replace(tzinfo=UTC)
