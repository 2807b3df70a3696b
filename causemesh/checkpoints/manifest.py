"""The manifest: which files make up a state, in which order, and what must be in them."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from causemesh.errors import Fatal

_MAGIC = b"CMMF"
_VERSION = 1
_PREFIX = struct.Struct("<4sIQ")
_FRAME = struct.Struct("<QQ")


@dataclass(frozen=True)
class File:
    """A file of a checkpoint: its name under the root, its size and its hash (SHA-256, hex)."""

    name: str
    size: int
    digest: str


@dataclass(frozen=True)
class Piece:
    """A piece as of a sequence; `file` None where the deltas after that hold all of it."""

    sequence: int
    file: File | None


@dataclass(frozen=True)
class Delta:
    """A file with the deltas `first` to `last`."""

    first: int
    last: int
    file: File


@dataclass(frozen=True)
class Step:
    """One body to apply: all deltas of a file that come next, or a piece."""

    sequence: int
    file: File | None
    body: bytes | None = None
    """In place of a file: a delta that lies in the manifest itself."""


@dataclass(frozen=True)
class Manifest:
    """A state as of `sequence`: the number of its checkpoint, which only grows.

    `tail` are the newest deltas, still in the manifest itself, by sequence. `host` and `root` say
    who wrote it and where, for people.
    """

    sequence: int
    pieces: Mapping[str, Piece] = field(default_factory=dict)
    deltas: tuple[Delta, ...] = ()
    tail: tuple[tuple[int, bytes], ...] = ()
    host: str = ""
    root: str = ""

    @property
    def files(self) -> set[str]:
        """The names of all files."""
        pieces = [piece.file.name for piece in self.pieces.values() if piece.file is not None]
        return {*pieces, *(delta.file.name for delta in self.deltas)}

    @property
    def piece_bytes(self) -> int:
        """Bytes of all pieces."""
        return sum(piece.file.size for piece in self.pieces.values() if piece.file is not None)

    @property
    def delta_bytes(self) -> int:
        """Bytes of all deltas."""
        tail = sum(len(body) for _, body in self.tail)
        return tail + sum(delta.file.size for delta in self.deltas)

    @property
    def covered(self) -> int:
        """All pieces hold the deltas up to this one."""
        return min((piece.sequence for piece in self.pieces.values()), default=0)

    def order(self) -> Iterator[Step]:
        """The files in the order in which their bodies count, and the tail.

        A file of several deltas is named again where a piece comes between two of them.
        """
        steps: list[tuple[int, int, Step]] = []
        for delta in self.deltas:
            for sequence in range(max(delta.first, self.covered + 1), delta.last + 1):
                steps.append((sequence, 0, Step(sequence, delta.file)))
        steps += [(sequence, 0, Step(sequence, None, body)) for sequence, body in self.tail]
        for piece in self.pieces.values():
            if piece.file is not None:
                steps.append((piece.sequence, 1, Step(piece.sequence, piece.file)))
        return (step for _, _, step in sorted(steps, key=lambda one: one[:2]))

    def dump(self) -> bytes:
        """As it lies in the positions row."""
        text = json.dumps(
            {
                "sequence": self.sequence,
                "pieces": [
                    [name, piece.sequence, _dumped(piece.file)]
                    for name, piece in self.pieces.items()
                ],
                "deltas": [[one.first, one.last, _dumped(one.file)] for one in self.deltas],
                "tail": [[sequence, len(body)] for sequence, body in self.tail],
                "host": self.host,
                "root": self.root,
            },
            separators=(",", ":"),
        ).encode()
        bodies = [body for _, body in self.tail]
        return b"".join([_PREFIX.pack(_MAGIC, _VERSION, len(text)), text, *bodies])

    @staticmethod
    def parse(state: bytes) -> Manifest:
        """What `dump` wrote. Raises Fatal for anything else."""
        magic, version, length = _PREFIX.unpack_from(state)
        if magic != _MAGIC or version != _VERSION:
            raise Fatal(f"not a checkpoint's manifest of format {_VERSION}: {magic!r}, {version}")
        read = json.loads(state[_PREFIX.size : _PREFIX.size + length])
        tail, at = [], _PREFIX.size + length
        for sequence, size in read["tail"]:
            tail.append((sequence, state[at : at + size]))
            at += size
        if at != len(state):
            raise Fatal(f"a checkpoint's manifest of {len(state)} bytes is cut short or padded")
        return Manifest(
            read["sequence"],
            {name: Piece(sequence, _file(told)) for name, sequence, told in read["pieces"]},
            tuple(Delta(first, last, File(*told)) for first, last, told in read["deltas"]),
            tuple(tail),
            read["host"],
            read["root"],
        )


def is_manifest(state: bytes) -> bool:
    """Whether a stored state is a manifest, not the state itself."""
    return state[: len(_MAGIC)] == _MAGIC


def framed(bodies: Iterable[tuple[int, bytes]]) -> bytes:
    """Bodies with their sequences as the content of a file."""
    parts: list[bytes] = []
    for sequence, body in bodies:
        parts += [_FRAME.pack(sequence, len(body)), body]
    return b"".join(parts)


def unframed(content: bytes) -> dict[int, bytes]:
    """What `framed` was given, by sequence. The content was checked against its hash before."""
    bodies, at = {}, 0
    while at < len(content):
        sequence, size = _FRAME.unpack_from(content, at)
        at += _FRAME.size
        bodies[sequence] = content[at : at + size]
        at += size
    return bodies


def digest_of(content: bytes) -> str:
    """The hash that a manifest keeps of a file."""
    return hashlib.sha256(content).hexdigest()


def _dumped(file: File | None) -> list[Any] | None:
    return None if file is None else list(asdict(file).values())


def _file(told: list[Any] | None) -> File | None:
    return None if told is None else File(*told)
