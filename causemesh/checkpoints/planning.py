"""What a checkpoint writes beside its delta: pieces anew, so that deltas can go, and merged deltas.

Pieces are written anew in turn, the oldest first, about half as many bytes as deltas bring. Deltas
from before the oldest piece are part of all pieces and go. So deltas are at most about twice the
pieces, no checkpoint writes the whole state, and a restart reads it about three times at most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from causemesh.checkpoints.manifest import Delta, Manifest, Piece

_LEAST_COST = 64 * 1024
"""Bytes that any piece costs: a file of its own is no gift."""
_OUTGROWN = 2
_MANY = 48
_TOGETHER = 16
_SMALL = 32 * 2**20


def resumed(manifest: Manifest, names: Sequence[str]) -> Manifest:
    """The manifest that was read back, with the pieces that the code of now cuts the state in.

    Those that it does not know may hold what others held: all deltas stay until they are written.
    """
    unknown = {name: Piece(0, None) for name in names if name not in manifest.pieces}
    return replace(manifest, pieces={**manifest.pieces, **unknown})


def present(manifest: Manifest, names: Sequence[str]) -> dict[str, Piece]:
    """The pieces as they are now.

    What a new one holds came since the manifest's checkpoint, so the next delta has all of it. One
    that is gone stays until all that are left were written after it: they may hold what it held.
    """
    begun = Piece(manifest.sequence, None)
    pieces = {name: manifest.pieces.get(name, begun) for name in names}
    covered = min(piece.sequence for piece in pieces.values())
    gone = {
        name: piece
        for name, piece in manifest.pieces.items()
        if name not in pieces and piece.sequence > covered
    }
    return {**gone, **pieces}


def chosen_pieces(
    pieces: Mapping[str, Piece], names: Sequence[str], credit: int
) -> tuple[list[str], int]:
    """Which of the named pieces to write anew with so many bytes of credit, and what is left."""
    chosen = []
    for name in sorted(names, key=lambda name: pieces[name].sequence):
        file = pieces[name].file
        cost = max(_LEAST_COST, 0 if file is None else file.size)
        if cost > credit:
            break
        credit -= cost
        chosen.append(name)
    return chosen, credit


def earned(manifest: Manifest, delta_bytes: int) -> int:
    """The credit that a delta earns: half its size, twice that where deltas are too many."""
    outgrown = manifest.delta_bytes > _OUTGROWN * manifest.piece_bytes
    return delta_bytes if outgrown else delta_bytes // 2


def needed(manifest: Manifest) -> Manifest:
    """Without the deltas that all pieces hold already."""
    covered = manifest.covered
    return replace(
        manifest,
        deltas=tuple(delta for delta in manifest.deltas if delta.last > covered),
        tail=tuple((sequence, body) for sequence, body in manifest.tail if sequence > covered),
    )


def mergeable(deltas: Sequence[Delta]) -> slice | None:
    """Which neighbours to put in one file: the smallest ones, once there are many files."""
    if len(deltas) <= _MANY:
        return None
    sizes = [delta.file.size for delta in deltas]
    starts = range(len(deltas) - _TOGETHER + 1)
    best = min(starts, key=lambda start: sum(sizes[start : start + _TOGETHER]))
    chosen = slice(best, best + _TOGETHER)
    return chosen if sum(sizes[chosen]) <= _SMALL else None
