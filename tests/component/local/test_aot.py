"""A Java server's AOT cache: made once, used, and done without where it is spoiled."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from causemesh.errors import Fatal
from causemesh.local import aot, artefacts
from causemesh.local.kafka import Kafka

pytestmark = [pytest.mark.servers, pytest.mark.timeout(300)]


def silent(name: str, state: str) -> None:
    """Progress that nobody follows."""


@pytest.fixture
def kafka(tmp_path: Path) -> Iterator[Kafka]:
    made = Kafka(tmp_path, 0, 0).elsewhere(tmp_path)
    yield made
    made.stop()


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder with Kafka in it and nothing that was recorded."""
    jars = artefacts.kafka_jars(silent)[0].parent
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / jars.name).symlink_to(jars)
    monkeypatch.setenv("CAUSEMESH_CACHE", str(folder))
    return folder


def mapped_share(kafka: Kafka, flags: list[str], log: Path) -> float:
    """Start Kafka; which part of the classes it loaded came from the cache, as Java says."""
    kafka.stop()
    log.unlink(missing_ok=True)
    kafka.launch(silent, [*flags, f"-Xlog:class+load:file={log}"])
    loaded = [line for line in log.read_text().splitlines() if " source: " in line]
    assert len(loaded) > 1_000
    return sum("shared objects file" in line for line in loaded) / len(loaded)


def test_it_is_recorded_once_and_then_classes_come_from_it(
    kafka: Kafka, empty_cache: Path, tmp_path: Path
) -> None:
    told: list[str] = []
    flags = aot.cached(kafka, lambda name, state: told.append(state))
    assert aot.cached(kafka, lambda name, state: told.append(state)) == flags
    assert [state.split(",")[0] for state in told] == ["recording a start"]
    (kept,) = empty_cache.glob("*.aot")
    assert flags == [f"-XX:AOTCache={kept}"]
    assert kafka.process.running() is None, "it was recorded on this server's own data"
    log = tmp_path / "classes.log"
    assert mapped_share(kafka, [], log) == 0
    assert mapped_share(kafka, flags, log) > 0.9
    kafka.stop()  # it has the file mapped
    kept.write_bytes(b"spoiled")
    assert mapped_share(kafka, flags, log) == 0, "Kafka starts without what doesn't fit"


def test_a_start_that_writes_no_cache_is_an_error(
    kafka: Kafka, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = Kafka.launch
    monkeypatch.setattr(Kafka, "launch", lambda self, progress, flags: launch(self, progress, []))
    with pytest.raises(Fatal, match="Java wrote no AOT cache of kafka-"):
        aot.cached(kafka, silent)
    assert list(empty_cache.glob("*.aot")) == []
