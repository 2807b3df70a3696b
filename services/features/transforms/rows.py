"""A table as it is stored: with its position and the causes that were applied to it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Source = tuple[str, int]
"""A cause's topic and partition."""
Mark = tuple[int, int]
"""Position and index of a cause."""
Table = dict[str, Any]
"""What a user's function gets and may change: JSON values by name, of one key."""

MAX_TABLE_BYTES = 262_144
_SEPARATOR = b"\x1f"
_NOTHING: Mark = (-1, -1)


@dataclass(frozen=True)
class Row:
    """One key's table. `sequence` is the input position of the last event applied to it."""

    sequence: int = -1
    marks: Mapping[Source, Mark] = field(default_factory=dict)
    value: str | None = None

    def seen(self, source: Source, mark: Mark) -> bool:
        """Whether an event of this cause was applied already."""
        return mark <= self.marks.get(source, _NOTHING)

    def table(self) -> Table:
        """A table of its own for the function to change."""
        return {} if self.value is None else dict(json.loads(self.value))

    def after(self, sequence: int, source: Source, mark: Mark, value: str | None) -> Row:
        """The row once an event was applied to it."""
        return Row(sequence, {**self.marks, source: mark}, value)

    @staticmethod
    def of_record(record: Mapping[str, Any]) -> Row:
        """A row from a TransformRow."""
        marks = {
            (one["topic"], one["partition"]): (one["position"], one["index"])
            for one in record["marks"]
        }
        return Row(record["sequence"], marks, record["value"])

    def fields(self) -> dict[str, Any]:
        """The fields of its TransformRow, less the envelope's."""
        marks = [
            {"topic": topic, "partition": partition, "position": position, "index": index}
            for (topic, partition), (position, index) in self.marks.items()
        ]
        return {"sequence": self.sequence, "marks": marks, "value": self.value}


def stored_form(table: Table) -> str | None:
    """A table as JSON; None for an empty one. Raises ValueError for no JSON, or too much of it."""
    if not table:
        return None
    try:
        text = json.dumps(table, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    except TypeError as error:
        raise ValueError(f"the table is no JSON: {error}") from error
    if (size := len(text.encode())) > MAX_TABLE_BYTES:
        raise ValueError(f"the table has {size} bytes, more than {MAX_TABLE_BYTES}")
    return text


def row_key(tenant_id: str | None, key: bytes) -> bytes:
    """The record key of a table; `tenant_id` None where all tenants share it."""
    return b"s" + key if tenant_id is None else b"t" + tenant_id.encode() + _SEPARATOR + key


def progress_key(partition: int) -> bytes:
    """The record key of a partition's own row: its position, and what its sources promised."""
    return b"p%d" % partition
