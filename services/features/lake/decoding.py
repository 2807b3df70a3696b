"""Decoding with every field that was ever written, not only those that this process was built with.

A producer may use a newer version of a record than the catalogue this writer was started with; its
new fields belong in the lake from their first record on.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from causemesh.bus.base import RawBatch
from causemesh.catalogue import WATERMARK
from causemesh.codec.base import BatchDecoder, Decoded
from causemesh.codec.decode import full_name
from causemesh.codec.registry import Registry, UnknownSchema
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
        return await self._widest_of(reader, partial(self._decoder.decode, values))

    async def decode_log(self, raw: RawBatch, reader: Mapping[str, Any]) -> Decoded:
        """See `BatchDecoder.decode_log`; `reader`'s columns come first."""
        return await self._widest_of(reader, partial(self._decoder.decode_log, raw))

    async def _widest_of(
        self, reader: Mapping[str, Any], decode: Callable[[Mapping[str, Any]], Awaitable[Decoded]]
    ) -> Decoded:
        """What is decoded, once more where a writer is met whose fields were not known."""
        name = full_name(reader)
        if name == WATERMARK:
            return await decode(reader)
        known = self._widest.get(id(reader))
        if known is None:
            known = self._widest[id(reader)] = _Widest(reader, dict(reader))
        while True:
            schema = known.schema
            decoded = await decode(schema)
            for schema_id in sorted(decoded.writers - known.writers):
                writer = await self._writer(schema_id)
                # from here on in one step: another worker may have widened it meanwhile
                if writer is not None and full_name(writer) == name:
                    known.schema = _wider(known.schema, writer)
                known.writers.add(schema_id)
            if known.schema is schema:
                return decoded

    async def _writer(self, schema_id: int) -> Mapping[str, Any] | None:
        try:
            return await self._registry.schema(schema_id)
        except UnknownSchema:
            return None  # the decoder says what is wrong with these records


def _wider(schema: dict[str, Any], writer: Mapping[str, Any]) -> dict[str, Any]:
    """The schema with the fields that the writer's has more."""
    have = {one["name"] for one in schema["fields"]}
    more = [one for one in writer["fields"] if one["name"] not in have]
    if not more:
        return schema
    wider = {**schema, "fields": [*schema["fields"], *more]}
    try:
        check_record(wider, columnar=True)
    except Misdeclared:
        return schema  # an inbox may be wider than columns can tell; its bytes are kept anyway
    return wider
