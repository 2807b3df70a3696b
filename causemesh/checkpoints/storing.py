"""Writing, reading and removing the files of one partition. All calls block: run them in a thread.

Who may commit is the position store's business: a worker that was replaced can write files, whose
names hold its epoch, but no manifest that names them. So a file counts only when a committed
manifest names it, and what none names is garbage: files of earlier epochs that the manifest read
with the claim does not name (the commit they were written for was lost, and can no longer succeed),
and files that a manifest named and its successor, which is committed, does not.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from causemesh.checkpoints.base import Encode
from causemesh.checkpoints.files import CheckpointFiles
from causemesh.checkpoints.manifest import (
    Delta,
    File,
    Manifest,
    Piece,
    digest_of,
    framed,
    unframed,
)
from causemesh.checkpoints.planning import mergeable, needed
from causemesh.errors import Fatal

_EPOCH = re.compile(r".*/(\d{10})-\d{10}-[^/]*")


@dataclass(frozen=True)
class PartitionFiles:
    """The files of one partition of one group, as a claim's epoch sees them.

    `check_hashes` is off only in a control arm of the tests.
    """

    files: CheckpointFiles
    folder: str
    epoch: int
    inline_bytes: int
    check_hashes: bool = True

    def first(self, sequence: int) -> Manifest:
        """A manifest of nothing."""
        return Manifest(sequence, host=socket.gethostname(), root=self.files.root)

    def with_piece(self, manifest: Manifest, name: str, number: int, body: bytes) -> Manifest:
        """The manifest with a piece as of its sequence, the `number`-th of it."""
        sequence = manifest.sequence
        file = self._write(sequence, f"piece{number}", [(sequence, body)])
        return replace(manifest, pieces={**manifest.pieces, name: Piece(sequence, file)})

    def advanced(self, manifest: Manifest, delta: bytes, pieces: Mapping[str, Encode]) -> Manifest:
        """The manifest with the next delta and, as of that, some pieces anew."""
        sequence = manifest.sequence + 1
        tail = (*manifest.tail, (sequence, delta))
        made = replace(self.first(sequence), pieces=manifest.pieces, deltas=manifest.deltas)
        if sum(len(body) for _, body in tail) > self.inline_bytes:
            file = self._write(sequence, "delta", tail)
            made = replace(made, deltas=(*made.deltas, Delta(tail[0][0], sequence, file)))
        else:
            made = replace(made, tail=tail)
        for number, (name, encode) in enumerate(pieces.items()):
            made = self.with_piece(made, name, number, encode())
        return self._merged(needed(made))

    def bodies(self, manifest: Manifest) -> Iterator[bytes]:
        """The bodies that make up the state, in order.

        Raises Fatal, naming the file, when one is missing or not what was written.
        """
        kept: dict[str, dict[int, bytes]] = {}  # the file of several deltas that is being read
        for step in manifest.order():
            if step.body is not None:
                yield step.body
                continue
            assert step.file is not None
            content = kept.get(step.file.name)
            if content is None:
                content = unframed(self._read(step.file, manifest))
                if len(content) > 1:
                    kept = {step.file.name: content}
            yield content[step.sequence]

    def sweep(self, manifest: Manifest | None) -> int:
        """Remove files of earlier epochs that the claimed manifest does not name; how many."""
        named = manifest.files if manifest is not None else set()
        found = [
            name
            for name in self.files.list(self.folder)
            if (told := _EPOCH.fullmatch(name)) is not None and int(told[1]) < self.epoch
        ]
        return self.remove(name for name in found if name not in named)

    def remove(self, names: Iterable[str]) -> int:
        """Remove these files; how many."""
        count = 0
        for name in names:
            self.files.delete(name)
            count += 1
        return count

    def _merged(self, manifest: Manifest) -> Manifest:
        """Some neighbouring deltas in one file, where there are many."""
        chosen = mergeable(manifest.deltas)
        if chosen is None:
            return manifest
        parts = manifest.deltas[chosen]
        bodies: dict[int, bytes] = {}
        for part in parts:
            bodies |= unframed(self._read(part.file, manifest))
        file = self._write(manifest.sequence, "deltas", bodies.items())
        together = Delta(parts[0].first, parts[-1].last, file)
        deltas = list(manifest.deltas)
        deltas[chosen] = [together]
        return replace(manifest, deltas=tuple(deltas))

    def _write(self, sequence: int, what: str, bodies: Iterable[tuple[int, bytes]]) -> File:
        content = framed(bodies)
        name = f"{self.folder}/{self.epoch:010}-{sequence:010}-{what}"
        self.files.write(name, content)
        return File(name, len(content), digest_of(content))

    def _read(self, file: File, manifest: Manifest) -> bytes:
        where = f"the checkpoint file {file.name}"
        try:
            content = self.files.read(file.name)
        except FileNotFoundError as error:
            raise Fatal(
                f"{where} is not under {self.files.root}; {manifest.host} wrote the checkpoint"
                f" under {manifest.root}. Processes that share a group need storage that all of"
                " them reach: see CAUSEMESH_CHECKPOINTS"
            ) from error
        if self.check_hashes and (len(content) != file.size or digest_of(content) != file.digest):
            raise Fatal(
                f"{where} under {self.files.root} is not what was written: {len(content)} bytes in"
                f" place of {file.size}, or others"
            )
        return content
