"""A Java server's AOT cache: made once, faster, and done without where it is spoiled."""

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


def cpu_s_of_a_start(kafka: Kafka, flags: list[str]) -> float:
    """CPU seconds until Kafka answers; its storage was formatted before."""
    kafka.stop()
    kafka.launch(silent, flags)
    process = kafka.process.running()
    assert process is not None
    times = process.cpu_times()
    return float(times.user + times.system)


def test_it_is_recorded_once_and_then_a_start_costs_half(kafka: Kafka, empty_cache: Path) -> None:
    told: list[str] = []
    flags = aot.cached(kafka, lambda name, state: told.append(state))
    assert aot.cached(kafka, lambda name, state: told.append(state)) == flags
    assert [state.split(",")[0] for state in told] == ["recording a start"]
    (kept,) = empty_cache.glob("*.aot")
    assert flags == [f"-XX:AOTCache={kept}"]
    assert kafka.process.running() is None, "it was recorded on this server's own data"
    kafka.launch(silent, [])  # formats
    without = min(cpu_s_of_a_start(kafka, []) for _ in range(2))
    cached = min(cpu_s_of_a_start(kafka, flags) for _ in range(2))
    print(f"\nCPU until it answers: {without:.2f} s without, {cached:.2f} s from the cache")
    assert cached < 0.5 * without
    kafka.stop()  # it has the file mapped
    kept.write_bytes(b"spoiled")
    assert cpu_s_of_a_start(kafka, flags) > 0.7 * without


def test_a_start_that_writes_no_cache_is_an_error(
    kafka: Kafka, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = Kafka.launch
    monkeypatch.setattr(Kafka, "launch", lambda self, progress, flags: launch(self, progress, []))
    with pytest.raises(Fatal, match="Java wrote no AOT cache of kafka-"):
        aot.cached(kafka, silent)
    assert list(empty_cache.glob("*.aot")) == []
