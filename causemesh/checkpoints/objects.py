"""Checkpoints in object storage, through pyarrow's file systems (the extra `lake`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from causemesh.checkpoints.files import CheckpointFiles, LocalFiles
from causemesh.errors import Misdeclared, Retryable


def open_files(uri: str) -> CheckpointFiles:
    """The files under a folder, `file:///folder`, `s3://bucket/folder`, `gs://...` or `abfss://...`.

    What else a store needs to know is in the URI's query, as pyarrow reads it, such as
    `?region=eu-central-1&endpoint_override=host:9000&scheme=http`; credentials come from where
    that store's tools look for them. Raises Misdeclared for a URI it can't read.
    """
    parts = urlsplit(uri)
    if not parts.scheme:
        return LocalFiles(Path(uri))
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
            raise Misdeclared(f"{uri} names no folder of this machine: write file:///folder")
        return LocalFiles(Path(unquote(parts.path)))
    if find_spec("pyarrow") is None:
        raise Misdeclared(
            f"{told(uri)} needs pyarrow: pip install 'causemesh[lake]', or an image that was built"
            " with EXTRA=objects (deploy/compose/objects.yml)"
        )
    return ObjectFiles(uri)


def told(uri: str) -> str:
    """A URI for logs, without the keys that may be in it."""
    parts = urlsplit(uri)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


class ObjectFiles:
    """See `CheckpointFiles`; an object appears when its upload is complete."""

    def __init__(self, uri: str) -> None:
        import pyarrow as pa  # noqa: PLC0415 - an extra
        from pyarrow import fs  # noqa: PLC0415

        self.root = told(uri)
        try:
            self._system, self._folder = fs.FileSystem.from_uri(uri)
        except (pa.ArrowInvalid, ValueError) as error:
            raise Misdeclared(f"{self.root} is no place for checkpoints: {error}") from error
        self._files = fs

    def write(self, name: str, content: bytes) -> None:
        """See `CheckpointFiles.write`."""
        with self._away(), self._system.open_output_stream(self._path(name)) as stream:
            stream.write(content)

    def read(self, name: str) -> bytes:
        """See `CheckpointFiles.read`."""
        with self._away(), self._system.open_input_file(self._path(name)) as file:
            content: bytes = file.read()
            return content

    def delete(self, name: str) -> None:
        """See `CheckpointFiles.delete`."""
        with self._away():
            try:
                self._system.delete_file(self._path(name))
            except FileNotFoundError:
                return

    def list(self, folder: str) -> Sequence[str]:
        """See `CheckpointFiles.list`."""
        selector = self._files.FileSelector(self._path(folder), allow_not_found=True)
        with self._away():
            found: list[Any] = self._system.get_file_info(selector)
        return [f"{folder}/{one.base_name}" for one in found if one.is_file]

    def _path(self, name: str) -> str:
        return f"{self._folder}/{name}"

    @contextmanager
    def _away(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:  # pyarrow raises it for every file system
            message = f"the storage of checkpoints, {self.root}, fails: {error!r}"
            raise Retryable(message, retry_after=1.0) from error
