"""Byte pieces of many rows, and their interleaving into one buffer in row order.

Each column gives one piece a row. numpy copies a piece as one item of a void type whose width is
the piece's, through a view of the buffer that has an item at every byte: a column then costs about
10 ns a row, whatever its width, and no index a byte.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt

from causemesh.codec.varint import Bytes, Ints, varints

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Even:
    """Pieces of one width: row i's lie at `i * stride` of `data`; stride 0 repeats one piece."""

    data: Bytes
    width: int
    stride: int


@dataclass(frozen=True, slots=True)
class Uneven:
    """Pieces of different widths: row i's are `lengths[i]` bytes from `starts[i]` of `data`."""

    data: Bytes
    starts: Ints
    lengths: Ints


Piece = Even | Uneven


def constant(data: bytes) -> Even:
    """The same bytes on every row."""
    return Even(np.frombuffer(data, dtype=np.uint8), len(data), 0)


def packed(data: bytes | Bytes, lengths: Ints) -> Piece:
    """Pieces that lie one behind the other."""
    buffer = np.frombuffer(data, dtype=np.uint8)
    width = int(lengths[0])
    if (lengths == width).all():
        return Even(buffer, width, width)
    return Uneven(buffer, np.cumsum(lengths) - lengths, lengths)


def numbers(values: Ints) -> Piece:
    """Varints, one a row."""
    if (values == values[0]).all():
        data, _, lengths = varints(values[:1])
        return Even(data, int(lengths[0]), 0)
    data, stride, lengths = varints(values)
    width = int(lengths[0])
    if (lengths == width).all():
        return Even(data, width, stride)
    return Uneven(data, np.arange(len(values)) * stride, lengths)


def where(mask: Mask | None, piece: Piece) -> Piece:
    """The piece on rows of `mask` (None: on all rows), no bytes on the others."""
    if mask is None:
        return piece
    if isinstance(piece, Uneven):
        return Uneven(piece.data, piece.starts, piece.lengths * mask)
    return Uneven(piece.data, np.arange(len(mask)) * piece.stride, mask * np.int64(piece.width))


def interleave(pieces: Sequence[Piece], count: int) -> tuple[Bytes, Ints]:
    """The pieces of row 0 in order, then of row 1, and so on: the buffer and each row's end."""
    blocks = list(_fused(pieces, count))
    total = np.zeros(count, dtype=np.int64)
    for block in blocks:
        total += block.width if isinstance(block, Even) else block.lengths
    ends = np.cumsum(total)
    at = ends - total
    buffer = np.empty(int(ends[-1]), dtype=np.uint8)
    for block in blocks:
        if isinstance(block, Even):
            _windows(buffer, block.width)[at] = _items(block, count)
            at += block.width
        else:
            _scatter(buffer, at, block)
            at += block.lengths
    return buffer, ends


def _fused(pieces: Sequence[Piece], count: int) -> Iterator[Piece]:
    """Runs of even pieces as one: copying at a stride is cheaper than scattering."""
    for even, run in groupby(pieces, lambda piece: isinstance(piece, Even)):
        if even:
            yield from _block([piece for piece in run if isinstance(piece, Even)], count)
        else:
            yield from run


def _block(run: list[Even], count: int) -> Iterator[Even]:
    run = _joined_constants([piece for piece in run if piece.width])
    if len(run) < 2:
        yield from run
        return
    width = sum(piece.width for piece in run)
    table = np.empty(count * width, dtype=np.uint8)
    offset = 0
    for piece in run:
        _view(table, count, piece.width, width, offset)[:] = _items(piece, count)
        offset += piece.width
    yield Even(table, width, width)


def _joined_constants(run: list[Even]) -> list[Even]:
    joined = []
    for same, pieces in groupby(run, lambda piece: piece.stride == 0):
        if same:
            joined.append(constant(b"".join(p.data[: p.width].tobytes() for p in pieces)))
        else:
            joined.extend(pieces)
    return joined


def _items(piece: Even, count: int) -> npt.NDArray[np.void]:
    return _view(piece.data, count, piece.width, piece.stride)


def _view(
    data: Bytes, count: int, width: int, stride: int, offset: int = 0
) -> npt.NDArray[np.void]:
    return np.ndarray((count,), _void(width), data, offset, (stride,))


def _windows(data: Bytes, width: int) -> npt.NDArray[np.void]:
    """An item of `width` bytes at every byte of `data`."""
    return _view(data, len(data) - width + 1, width, 1)


def _void(width: int) -> np.dtype[Any]:
    return np.dtype((np.void, width))


def _scatter(buffer: Bytes, at: Ints, piece: Uneven) -> None:
    """Copy by powers of two: a piece is its first and its last 2**k bytes, which may overlap."""
    for power in range(int(piece.lengths.max()).bit_length()):
        rows = np.flatnonzero(piece.lengths >> power == 1)
        if not len(rows):
            continue
        starts, targets, lengths = piece.starts[rows], at[rows], piece.lengths[rows]
        width = int(lengths.min())
        source, target = _windows(piece.data, width), _windows(buffer, width)
        target[targets] = source[starts]
        rest = lengths - width
        if rest.any():
            target[targets + rest] = source[starts + rest]
