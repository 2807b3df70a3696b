"""Decoding with every field that was ever written, not only those that this process was built with.

A producer may use a newer version of a record than the catalogue this writer was started with; its
new fields belong in the lake from their first record on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from causemesh.bus.base import RawBatch
from causemesh.catalogue import WATERMARK
from causemesh.codec.base import BatchDecoder, Decoded
from causemesh.codec.decode import full_name
from causemesh.codec.registry import Registry, UnknownSchema
from causemesh.codec.wire import FOREIGN, schema_ids
from causemesh.errors import Misdeclared
from causemesh.schemas import check_record


@dataclass
class _Widest:
    reader: Mapping[str, Any]
    schema: dict[str, Any]
    writers: set[int] = field(default_factory=set)


class WidestDecoder:
    """A decoder whose reader schemas grow by the fields that writers' schemas have more."""

    def __init__(self, decoder: BatchDecoder, registry: Registry) -> None:
        self._decoder = decoder
        self._registry = registry
        # By identity, with the reader kept so that its id stays its own: an inbox and its events
        # share the record's name and not its envelope.
        self._widest: dict[int, _Widest] = {}

    async def decode(self, values: Sequence[bytes | None], reader: Mapping[str, Any]) -> Decoded:
        """See `BatchDecoder.decode`; `reader`'s columns come first."""
        name = full_name(reader)
        if name == WATERMARK:
            return await self._decoder.decode(values, reader)
        known = self._widest.get(id(reader))
        if known is None:
            known = self._widest[id(reader)] = _Widest(reader, dict(reader))
        for schema_id in np.unique(schema_ids(values)).tolist():
            if schema_id != FOREIGN and schema_id not in known.writers:
                known.schema = await self._with(name, known.schema, schema_id)
                known.writers.add(schema_id)
        return await self._decoder.decode(values, known.schema)

    async def decode_log(self, raw: RawBatch, reader: Mapping[str, Any]) -> Decoded:
        """See `BatchDecoder.decode_log`. One by one: a block may hold records of a writer's schema
        that is new, behind others, and none of its fields may be lost."""
        return await self.decode(raw.values, reader)

    async def _with(self, name: str, widest: dict[str, Any], schema_id: int) -> dict[str, Any]:
        """The schema with the fields that the writer's has more, if it is one of this record."""
        try:
            writer = await self._registry.schema(schema_id)
        except UnknownSchema:
            return widest  # the decoder says what is wrong with these records
        if full_name(writer) != name:
            return widest
        have = {one["name"] for one in widest["fields"]}
        more = [one for one in writer["fields"] if one["name"] not in have]
        wider = {**widest, "fields": [*widest["fields"], *more]}
        try:
            check_record(wider, columnar=True)
        except Misdeclared:
            return widest  # an inbox may be wider than columns can tell; its bytes are kept anyway
        return wider if more else widest
