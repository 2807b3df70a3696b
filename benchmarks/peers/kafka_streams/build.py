"""Fetches Kafka Streams from Maven Central, pinned by checksum, and compiles the benchmarks."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path

import jgo

from causemesh.local.artefacts import cache

VERSIONS = {"kafka-streams": "4.1.0", "avro": "1.12.0"}
_ENDPOINT = "org.apache.kafka:kafka-streams:4.1.0+org.apache.avro:avro:1.12.0"
_HERE = Path(__file__).parent
_SOURCES = sorted(_HERE.glob("*.java"))
_PINNED = _HERE / "jars.sha256"


def command(program: str = "FeatureCounts") -> list[str | Path]:
    """The command line of a program up to its own arguments; fetches and compiles what is missing.

    Raises RuntimeError for a jar that is not the pinned one, or without a JDK.
    """
    made_of = b"".join(one.read_bytes() for one in (*_SOURCES, _PINNED))
    kept = cache() / f"bench-kafka-streams-{hashlib.sha256(made_of).hexdigest()[:12]}"
    if not kept.exists():
        partial = kept.with_name(f"{kept.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _fetch(partial)
        _compile(partial)
        partial.rename(kept)
    heap = ["-Xms1g", "-Xmx1g", "-Dorg.slf4j.simpleLogger.defaultLogLevel=error"]
    return [_tool("java"), *heap, "-cp", f"{kept}:{kept}/*", program]


def java_version() -> str:
    """What the runtime calls itself."""
    told = subprocess.run([_tool("java"), "-version"], capture_output=True, text=True, check=True)
    return told.stderr.splitlines()[0]


def _fetch(folder: Path) -> None:
    lines = [line.split() for line in _PINNED.read_text().splitlines()]
    pinned = {name: checksum for checksum, name in lines}
    found = {Path(jar).name: Path(jar) for jar in jgo.build(_ENDPOINT).all_jars}
    if found.keys() != pinned.keys():
        raise RuntimeError(f"other jars than pinned: {sorted(found.keys() ^ pinned.keys())}")
    for name, jar in found.items():
        digest = hashlib.sha256(jar.read_bytes()).hexdigest()
        if digest != pinned[name]:
            raise RuntimeError(f"{name} has the checksum {digest}, pinned is {pinned[name]}")
        shutil.copyfile(jar, folder / name)


def _compile(folder: Path) -> None:
    argv: list[str | Path] = [_tool("javac"), "-cp", f"{folder}/*", "-d", folder, *_SOURCES]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the programs do not compile:\n{done.stderr}")


def _tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise RuntimeError(f"no {name} here; Kafka Streams needs a JDK of version 17 or later")
    return found
