"""Confluent wire format: a zero byte, the schema id as four big-endian bytes, the Avro body."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import Any

import numpy as np
import numpy.typing as npt

HEADER_BYTES = 5
FOREIGN = -1
_HEAD: Any = itemgetter(slice(0, HEADER_BYTES))


def header(schema_id: int) -> bytes:
    """The five bytes before a body."""
    return b"\x00" + schema_id.to_bytes(4, "big")


def schema_ids(values: Sequence[bytes | None]) -> npt.NDArray[np.int64]:
    """The schema id of each value; `FOREIGN` for null, short or unframed ones."""
    heads = _all_heads(values)
    if len(heads) != HEADER_BYTES * len(values):
        heads = b"".join(
            [
                value[:HEADER_BYTES] if value and len(value) >= HEADER_BYTES else b"\xff" * 5
                for value in values
            ]
        )
    table = np.frombuffer(heads, dtype=np.uint8).reshape(len(values), HEADER_BYTES)
    ids = np.ascontiguousarray(table[:, 1:]).view(">u4").reshape(len(values)).astype(np.int64)
    ids[table[:, 0] != 0] = FOREIGN
    return ids


def _all_heads(values: Sequence[bytes | None]) -> bytes:
    """The first bytes of all values, joined: shorter than it should be when a value is."""
    try:
        return b"".join(map(_HEAD, values))
    except TypeError:  # a null among them
        return b""
