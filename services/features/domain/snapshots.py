"""One container for all saved state: a header, and named frames as compressed Arrow IPC.

Layout: magic, format version and header length (little-endian), a JSON header, then the blobs in
the order the header lists them. Nothing in it is executable, and another version is refused.
"""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np
import polars as pl

from causemesh.errors import Fatal
from services.features.domain.events import Ints

_MAGIC = b"CMFS"
_VERSION = 3
_PREFIX = struct.Struct("<4sII")


def pack(
    header: Mapping[str, Any],
    frames: Mapping[str, pl.DataFrame],
    blobs: Mapping[str, bytes] | None = None,
) -> bytes:
    """Header, frames and blobs (snapshots within a snapshot) as bytes."""
    bodies = [_frame_bytes(frame) for frame in frames.values()]
    bodies += (blobs or {}).values()
    sizes = [len(body) for body in bodies]
    listed = {**header, "__frames": list(frames), "__blobs": list(blobs or {}), "__sizes": sizes}
    text = json.dumps(listed).encode()
    return b"".join([_PREFIX.pack(_MAGIC, _VERSION, len(text)), text, *bodies])


def unpack(snapshot: bytes, kind: str) -> tuple[dict[str, Any], dict[str, pl.DataFrame]]:
    """Header and frames of a snapshot of this kind; Fatal for anything else."""
    header, bodies = _split(snapshot, kind)
    return header, {name: pl.read_ipc(bodies[name]) for name in header["__frames"]}


def unpack_blobs(snapshot: bytes, kind: str) -> dict[str, bytes]:
    """The blobs of a snapshot of this kind; Fatal for anything else."""
    return unpack_all(snapshot, kind)[1]


def unpack_all(snapshot: bytes, kind: str) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Header and blobs of a snapshot of this kind; Fatal for anything else."""
    header, bodies = _split(snapshot, kind)
    return header, {name: bodies[name] for name in header["__blobs"]}


def matrix_frame(array: Ints) -> pl.DataFrame:
    """An array [n, ...] as a frame of n rows, one column for each place in the other axes."""
    flat = array.reshape(len(array), prod(array.shape[1:]))
    return pl.DataFrame({str(place): flat[:, place] for place in range(flat.shape[1])})


def frame_matrix(frame: pl.DataFrame, rows: int, *shape: int) -> Ints:
    """The array of shape [rows, *shape] that `matrix_frame` was given."""
    out = np.empty((rows, frame.width), np.int64)
    for place, series in enumerate(frame):
        out[:, place] = series.to_numpy()
    return out.reshape(rows, *shape)


def _split(snapshot: bytes, kind: str) -> tuple[dict[str, Any], dict[str, bytes]]:
    if len(snapshot) < _PREFIX.size:
        raise Fatal(f"{len(snapshot)} bytes are no feature snapshot")
    magic, version, length = _PREFIX.unpack_from(snapshot)
    if magic != _MAGIC or version != _VERSION:
        raise Fatal(f"not a feature snapshot of format {_VERSION}: {magic!r}, format {version}")
    start = _PREFIX.size + length
    header = json.loads(snapshot[_PREFIX.size : start])
    if header.get("kind") != kind:
        raise Fatal(f"expected a snapshot of a {kind}, found one of a {header.get('kind')}")
    if len(snapshot) != start + sum(header["__sizes"]):
        raise Fatal(f"a feature snapshot of {len(snapshot)} bytes is cut short or padded")
    bodies: dict[str, bytes] = {}
    for name, size in zip(header["__frames"] + header["__blobs"], header["__sizes"], strict=True):
        bodies[name] = snapshot[start : start + size]
        start += size
    return header, bodies


def _frame_bytes(frame: pl.DataFrame) -> bytes:
    buffer = io.BytesIO()
    frame.write_ipc(buffer, compression="zstd")
    return buffer.getvalue()
