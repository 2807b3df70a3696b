"""Columns to framed values."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import fastavro
import polars as pl

from causemesh.codec.base import BatchEncoder
from causemesh.codec.registry import Registry
from causemesh.codec.wire import header

_INSTANTS = frozenset(("timestamp-micros", "timestamp-millis"))


class Encoder:
    """Encodes frames of one record under one schema id."""

    def __init__(self, schema: Mapping[str, Any], schema_id: int) -> None:
        self._header = header(schema_id)
        self._names = [field["name"] for field in schema["fields"]]
        instants = [f["name"] for f in schema["fields"] if _instant(f["type"])]
        # Instants go as integers: building a datetime a record would cost more than encoding it.
        self._as_integers = [pl.col(name).to_physical() for name in instants]
        fields = [
            {**field, "type": _bare_instant(field["type"])} if field["name"] in instants else field
            for field in schema["fields"]
        ]
        self._parsed = fastavro.parse_schema({**schema, "fields": fields})

    def encode(self, frame: pl.DataFrame) -> list[bytes]:
        """One framed value a row; raises ValueError naming the row that does not fit the schema."""
        stream = io.BytesIO()
        ends: list[int] = []
        for row in frame.select(self._names).with_columns(self._as_integers).iter_rows(named=True):
            try:
                fastavro.schemaless_writer(stream, self._parsed, row)
            except Exception as error:
                raise ValueError(f"row {len(ends)} does not fit its schema: {error!r}") from error
            ends.append(stream.tell())
        joined = stream.getvalue()
        starts = [0, *ends[:-1]]
        return [self._header + joined[a:b] for a, b in zip(starts, ends, strict=True)]


class RegistryEncoders:
    """Makes encoders, registering each schema under its subject (idempotent at the registry)."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    async def encoder(self, subject: str, schema: Mapping[str, Any]) -> BatchEncoder:
        """See `EncoderFactory.encoder`."""
        return Encoder(schema, await self._registry.register(subject, schema))


def _instant(avro: Any) -> bool:
    branches = avro if isinstance(avro, list) else [avro]
    return any(isinstance(b, dict) and b.get("logicalType") in _INSTANTS for b in branches)


def _bare_instant(avro: Any) -> Any:
    if isinstance(avro, list):
        return [_bare_instant(branch) for branch in avro]
    return "long" if isinstance(avro, dict) and avro.get("logicalType") in _INSTANTS else avro
