"""Avro types as column types."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import polars as pl

_PRIMITIVES: dict[str, Any] = {
    "null": pl.Null,
    "boolean": pl.Boolean,
    "int": pl.Int32,
    "long": pl.Int64,
    "float": pl.Float32,
    "double": pl.Float64,
    "bytes": pl.Binary,
    "string": pl.String,
}
_LOGICAL: dict[str, Any] = {
    "timestamp-micros": pl.Datetime("us", "UTC"),
    "timestamp-millis": pl.Datetime("ms", "UTC"),
    "date": pl.Date,
}
_PROMOTES = {
    ("int", "long"),
    ("int", "double"),
    ("float", "double"),
}


def column_type(avro: Any) -> Any:  # noqa: PLR0911 - one return a kind of type
    """The polars type of an Avro type; enums and uuids are strings."""
    if isinstance(avro, list):
        return column_type(next(branch for branch in avro if branch != "null"))
    if isinstance(avro, str):
        return _PRIMITIVES[avro]
    kind = avro["type"]
    if avro.get("logicalType") in _LOGICAL:
        return _LOGICAL[avro["logicalType"]]
    if avro.get("logicalType") == "decimal":
        return pl.Decimal(avro["precision"], avro.get("scale", 0))
    if kind == "record":
        return pl.Struct({field["name"]: column_type(field["type"]) for field in avro["fields"]})
    if kind == "array":
        return pl.List(column_type(avro["items"]))
    if kind == "enum":
        return pl.String
    return pl.Binary if kind == "fixed" else column_type(kind)


def frame_schema(record: Mapping[str, Any]) -> pl.Schema:
    """The columns of a record, also for an empty frame."""
    return pl.Schema({field["name"]: column_type(field["type"]) for field in record["fields"]})


class NotExpressibleError(Exception):
    """This writer's rows can't be brought to the reader's columns by column operations."""


def resolve(
    frame: pl.DataFrame, writer: Mapping[str, Any], reader: Mapping[str, Any]
) -> pl.DataFrame:
    """Bring columns read with the writer's schema to the reader's: fill defaults, drop, widen.

    Raises NotExpressibleError for anything else; the caller then resolves record by record.
    """
    written = {field["name"]: field for field in writer["fields"]}
    columns = []
    for field in reader["fields"]:
        name, target = field["name"], column_type(field["type"])
        if name not in written:
            columns.append(_default(field, target).alias(name))
        else:
            if not _widens(written[name]["type"], field["type"]):
                raise NotExpressibleError(name)
            columns.append(pl.col(name).cast(target))
    return frame.select(columns)


def _default(field: Mapping[str, Any], target: Any) -> pl.Expr:
    if "default" not in field or isinstance(field["default"], (list, dict)):
        raise NotExpressibleError(field["name"])
    return pl.lit(field["default"], dtype=target)


def _widens(writer: Any, reader: Any) -> bool:
    if shape(writer) == shape(reader):
        return True
    if isinstance(reader, list) and not isinstance(writer, list):
        return any(_widens(writer, branch) for branch in reader if branch != "null")
    if isinstance(reader, list) and isinstance(writer, list):
        return _widens(writer[-1], reader[-1]) and len(writer) == len(reader) == 2
    return (str(writer), str(reader)) in _PROMOTES


def shape(avro: Any) -> str:
    """A comparable form of a type, without docs, defaults and namespaces."""
    return json.dumps(_bare(avro), sort_keys=True)


def _bare(avro: Any) -> Any:
    if isinstance(avro, list):
        return [_bare(branch) for branch in avro]
    if not isinstance(avro, dict):
        return avro.rsplit(".", 1)[-1] if isinstance(avro, str) else avro
    kept = {key: value for key, value in avro.items() if key not in ("doc", "default", "namespace")}
    return {key: _bare(value) if key != "symbols" else value for key, value in kept.items()}
