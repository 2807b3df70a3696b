"""What a Java server has loaded and linked when it is ready, kept so that its next start maps it.

The packaged runtime comes without an archive even of its own classes. The file is the JDK's AOT
cache (JEP 483 and 514), made once a version by a start on empty data. Java checks that it fits the
runtime and the jars, and does without where it does not.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, Self

from causemesh.errors import Fatal
from causemesh.local import artefacts
from causemesh.local.artefacts import Progress
from causemesh.local.process import ServerProcess

_WRITTEN_S = 240.0


class JavaServer(Protocol):
    """A server that can be started a second time on other data."""

    process: ServerProcess
    version: str

    def elsewhere(self, home: Path) -> Self:
        """The same server on ports and data of its own."""

    def launch(self, progress: Progress, flags: Sequence[str]) -> None:
        """Start with these flags of Java too; returns when it works."""


def cached(server: JavaServer, progress: Progress) -> list[str]:
    """Java's flags for a start from the cache, which is made when there is none yet."""
    name = server.process.name
    named = f"{name}-{server.version}-java-{artefacts.java_version()}.aot"
    kept = artefacts.cache() / named
    with artefacts.once(kept) as missing:
        if missing:
            progress(name, "recording a start, once, to be faster from the next on")
            _record(server, kept)
    return [f"-XX:AOTCache={kept}"]


def _record(server: JavaServer, kept: Path) -> None:
    """Start on empty data and stop; Java writes the cache when it ends. Raises Fatal when it does
    not."""
    with tempfile.TemporaryDirectory(prefix=f"causemesh-{server.process.name}-") as folder:
        recorded = server.elsewhere(Path(folder))
        partial = kept.with_suffix(".partial")
        partial.unlink(missing_ok=True)
        # Without profiles, which would have the next start compile all that was ever warm at once.
        flags = [f"-XX:AOTCacheOutput={partial}", "-XX:TieredStopAtLevel=1"]
        try:
            recorded.launch(lambda name, state: None, flags)
        finally:
            recorded.process.stop(timeout_s=_WRITTEN_S)
        if not partial.exists():
            raise Fatal(f"Java wrote no AOT cache of {kept.stem}:\n{recorded.process.tail()}")
        partial.rename(kept)
