"""Records written one by one; what the mesh itself made of them is not looked through again.

`RowEncoder` checks every field, the envelope's too, which is most of what an event of a transform
would cost beside Faust.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import fastavro

from causemesh.codec.rows import fit
from causemesh.codec.wire import header

ENVELOPE = frozenset(["event_id", "tenant_id", "occurred_at", "cause"])


class RecordEncoder:
    """Frames records whose every field is of the mesh's own making."""

    def __init__(self, schema: Mapping[str, Any], schema_id: int) -> None:
        self._schema = schema
        self._header = header(schema_id)
        self._parsed = fastavro.parse_schema(dict(schema))

    def encode(self, record: Mapping[str, Any]) -> bytes:
        """A framed value. Raises ValueError for what is no record of the schema."""
        stream = io.BytesIO()
        try:
            fastavro.schemaless_writer(stream, self._parsed, record, strict=True)
        except Exception as error:
            raise ValueError(f"does not fit {self._schema['name']}: {error}"[:300]) from error
        return self._header + stream.getvalue()


class OutputEncoder(RecordEncoder):
    """Frames events of a transform: the envelope is the mesh's, the other fields are the user's."""

    def __init__(self, schema: Mapping[str, Any], schema_id: int) -> None:
        super().__init__(schema, schema_id)
        theirs = [one for one in schema["fields"] if one["name"] not in ENVELOPE]
        self._theirs = {**schema, "fields": theirs}

    def encode(self, record: Mapping[str, Any]) -> bytes:
        """A framed value. Raises ValueError saying which of the user's fields does not fit."""
        ours = {name: record[name] for name in ENVELOPE}
        yielded = {name: value for name, value in record.items() if name not in ENVELOPE}
        return super().encode({**ours, **fit(self._theirs, yielded)})
