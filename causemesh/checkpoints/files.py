"""Where files of checkpoints lie: a small interface, and a folder of this machine."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from causemesh.errors import Retryable

_PART = ".part"


class CheckpointFiles(Protocol):
    """Files by name (with slashes), each written once and never changed. Calls block.

    All raise Retryable when the storage does not answer.
    """

    root: str
    """As a URI, for people."""

    def write(self, name: str, content: bytes) -> None:
        """Store a file; when this returns it outlasts a crash of the machine."""

    def read(self, name: str) -> bytes:
        """The content of a file. Raises FileNotFoundError."""

    def delete(self, name: str) -> None:
        """Remove a file, if it is there."""

    def list(self, folder: str) -> Sequence[str]:
        """The names of all files in a folder; none when there is no such folder."""


class LocalFiles:
    """Files in a folder: written beside their place, made durable, then renamed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()
        self.root = self._folder.as_uri()

    def write(self, name: str, content: bytes) -> None:
        """See `CheckpointFiles.write`."""
        path = self._folder / name
        part = path.with_name(path.name + _PART)
        try:
            _make_folder(path.parent)
            with part.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
            _sync_folder(path.parent)
        except OSError as error:
            raise _away(self.root, error) from error

    def read(self, name: str) -> bytes:
        """See `CheckpointFiles.read`."""
        try:
            return (self._folder / name).read_bytes()
        except FileNotFoundError:
            raise
        except OSError as error:
            raise _away(self.root, error) from error

    def delete(self, name: str) -> None:
        """See `CheckpointFiles.delete`."""
        try:
            (self._folder / name).unlink(missing_ok=True)
        except OSError as error:
            raise _away(self.root, error) from error

    def list(self, folder: str) -> Sequence[str]:
        """See `CheckpointFiles.list`."""
        try:
            return [f"{folder}/{path.name}" for path in (self._folder / folder).iterdir()]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise _away(self.root, error) from error


def _away(root: str, error: OSError) -> Retryable:
    return Retryable(f"the storage of checkpoints, {root}, fails: {error!r}", retry_after=1.0)


def _make_folder(folder: Path) -> None:
    """Make it, and make that durable."""
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for one in missing:
        _sync_folder(one.parent)


def _sync_folder(folder: Path) -> None:
    """Make new names in it durable."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
