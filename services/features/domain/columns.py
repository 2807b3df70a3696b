"""Arrays and keys as bytes, for what is written often: a tenth of the time of Arrow IPC frames.

Layout: magic and header length (little-endian), a JSON header, then all arrays (int64) and the keys
behind one another as one LZ4 block.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from math import prod
from typing import Any

import cramjam
import numpy as np

from causemesh.errors import Fatal
from services.features.domain.events import Ints

_MAGIC = b"CMFC"
_PREFIX = struct.Struct("<4sI")
_NO_KEY = -1
_NOTHING = memoryview(b"")


def pack_columns(
    header: Mapping[str, Any],
    arrays: Mapping[str, Ints | Sequence[Ints]],
    keys: Sequence[str | None] = (),
) -> bytes:
    """A header, int64 arrays of any shape by name, and a list of keys.

    An array with one axis may come in parts: putting them together would be another copy.
    """
    lengths = [_NO_KEY if key is None else len(key) for key in keys]
    text = "".join(key for key in keys if key is not None).encode()
    told = [(name, _parts(given)) for name, given in arrays.items()]
    told.append(("__lengths", [np.array(lengths, np.int64)]))
    shapes = [[name, [sum(map(len, parts)), *parts[0].shape[1:]]] for name, parts in told]
    head = json.dumps({**header, "__arrays": shapes}).encode()
    body = b"".join([*(_buffer(part) for _, parts in told for part in parts), text])
    packed = bytes(cramjam.lz4.compress_block(body))
    return b"".join([_PREFIX.pack(_MAGIC, len(head)), head, packed])


def unpack_columns(
    packed: bytes, kind: str
) -> tuple[dict[str, Any], dict[str, Ints], list[str | None]]:
    """What `pack_columns` was given, of this kind, read-only; Fatal for anything else."""
    magic, length = _PREFIX.unpack_from(packed)
    start = _PREFIX.size + length
    header = json.loads(packed[_PREFIX.size : start]) if magic == _MAGIC else {}
    if header.get("kind") != kind:
        raise Fatal(f"expected columns of a {kind}, found {magic!r} of a {header.get('kind')}")
    body = bytes(cramjam.lz4.decompress_block(packed[start:]))
    arrays: dict[str, Ints] = {}
    at = 0
    for name, shape in header["__arrays"]:
        count = prod(shape)
        arrays[name] = np.frombuffer(body, np.int64, count, at).reshape(shape)
        at += 8 * count
    return header, arrays, _keys(arrays.pop("__lengths"), body[at:].decode())


def _parts(given: Ints | Sequence[Ints]) -> Sequence[Ints]:
    return [given] if isinstance(given, np.ndarray) else given


def _buffer(array: Ints) -> memoryview:
    # one copy less than `tobytes`, and a view of nothing can't be cast
    return np.ascontiguousarray(array).reshape(-1).data.cast("B") if array.size else _NOTHING


def _keys(lengths: Ints, text: str) -> list[str | None]:
    ends = accumulate(np.maximum(lengths, 0).tolist(), initial=0)
    return [
        None if length == _NO_KEY else text[start:end]
        for length, (start, end) in zip(lengths.tolist(), pairwise(ends), strict=True)
    ]
