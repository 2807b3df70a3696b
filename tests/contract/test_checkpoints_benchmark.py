"""The benchmark of checkpoints in its short form: it measures files, or it fails."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import feature_checkpoints_load as load
from benchmarks import harness, report
from benchmarks.feature_checkpoints import Bench, measure
from causemesh.errors import Misdeclared

ENTITIES, UNITS = 3_000, 6


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small units, and checkpoints without a wait."""
    monkeypatch.setattr(load, "UNIT", 500)
    monkeypatch.setattr(load, "COMMIT_UNITS", 2)
    monkeypatch.setattr(load, "COMMIT_S", 0.0)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(ENTITIES, UNITS, "uniform", tmp_path / "files", inline=1_000)
    yield made
    made.close()


def result_of(benchmark: str, arms: Any) -> dict[str, Any]:
    return {
        "benchmark": benchmark,
        "measured_at": "2026-01-01T00:00:00+00:00",
        "commit": "0" * 12,
        "machine": {**harness.machine(), "cpu": "a processor"},
        "versions": {},
        "about": {},
        "arms": arms,
    }


def page_of(result: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The page where this is the only result."""
    folder.mkdir()
    (folder / f"{result['benchmark']}-20260101T000000Z.json").write_text(json.dumps(result))
    monkeypatch.setattr(report, "RESULTS", folder)
    return report.page()


def row(page: str, begins: str) -> str:
    (found,) = (line for line in page.splitlines() if line.startswith(f"| {begins}"))
    return found


def test_what_it_measures_is_on_the_page(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arms, found = measure(bench, 2)
    for one in found["with checkpoints"]:
        assert one["checkpoints"] >= 1
        assert 0 < one["cost_percent"] < 100
        assert 0 < one["delta_mib"] <= one["largest_delta_mib"]
    for one in found["first checkpoint"]:
        assert one["mib"] > 0
        assert one["files"] >= 1
    assert all(one["seconds"] > 0 for one in found["restart"])

    result = result_of("checkpoints", harness.table(arms, found))
    page = page_of(result, tmp_path / "results", monkeypatch)
    figures = {arm["name"]: arm["figures"] for arm in result["arms"]}
    for name in ("without checkpoints", "with checkpoints"):
        median = figures[name]["events_per_cpu_second"]["median"]
        assert f"{median:,.0f}" in row(page, f"{name} |")
    assert "| yes |" in row(page, "the same, beside the load: 4 GB of memory")
    assert "| yes |" in row(page, "the same, a restart from cold files: 20 s")
    seconds = figures["restart"]["seconds"]["median"]
    assert f"{seconds:.1f} (" in row(page, "restart |")

    figures["restart"]["seconds"]["median"] = 20.1
    figures["with checkpoints"]["cost_percent"]["median"] = 5.1
    page = page_of(result, tmp_path / "slower", monkeypatch)
    assert "| 20.1 s | **no** |" in row(page, "the same, a restart")
    assert "| 5.1 % | **no** |" in row(page, "checkpoints of 2,000,000")


def test_where_no_file_is_written_there_is_no_result(tmp_path: Path) -> None:
    bench = Bench(ENTITIES, UNITS, "uniform", tmp_path, inline=2**40)
    with pytest.raises(RuntimeError, match="wrote no file"):
        bench.first()
    bench.close()


def test_deltas_that_stay_in_the_row_are_no_result(bench: Bench) -> None:
    bench.first()
    assert bench._keeper is not None
    assert bench._keeper._place is not None
    object.__setattr__(bench._keeper._place, "inline_bytes", 2**40)
    with pytest.raises(RuntimeError, match="wrote no delta to a file"):
        bench.with_checkpoints()


def test_a_state_that_lacks_a_part_of_the_protocol_is_refused(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(load.Partition, "replaced")
    with pytest.raises(Misdeclared, match="Partition has no replaced"):
        bench.first()


def test_another_state_read_back_is_no_result(bench: Bench) -> None:
    bench.first()
    bench.partition.track()
    bench.prepare_restart()
    bench._digest = "of another state"
    with pytest.raises(RuntimeError, match="not the one that was written"):
        bench.restart()


@pytest.mark.parametrize(("seconds", "met"), [(30.0, "yes"), (30.1, "**no**")])
def test_a_backfill_is_on_the_page(
    seconds: float, met: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = {
        "events": 123_456.0,
        "loop_held_p99_ms": 12.0,
        "loop_held_most_ms": 34.0,
        "cpu_seconds": 56.7,
        "seconds": seconds,
        "events_per_second": 1_000.0,
    }
    arm = harness.Arm("year", lambda: figures, rate="events_per_second")
    result = result_of("backfill", harness.table([arm], {"year": [figures]}))
    page = page_of(result, tmp_path / "results", monkeypatch)
    assert f"| {seconds} s | {met} |" in row(page, "backfill of a year of flights")
    assert row(page, "year |") == (
        f"| year | 123,456 | {seconds} | {seconds} to {seconds} | 56.7 | 12 | 34 |"
    )
