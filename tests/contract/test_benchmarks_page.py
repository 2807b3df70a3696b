"""docs/benchmarks.md says what the newest committed results say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from benchmarks import report


def test_the_page_is_made_from_the_newest_results() -> None:
    assert report.PAGE.read_text() == report.page(), "run make bench-docs"


def test_the_plot_is_made_from_the_newest_results() -> None:
    measured = report.newest("mesh")
    drawn = report.PLOT.read_text() if report.PLOT.exists() else None
    assert drawn == (report.plot(measured["runs"]) if measured else None)


@pytest.mark.parametrize("benchmark", ["features", "usage"])
def test_another_figure_makes_another_page(
    benchmark: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(report.RESULTS, tmp_path, dirs_exist_ok=True)
    result = json.loads(json.dumps(report.newest(benchmark)))
    result["arms"][0]["figures"]["records_per_second"]["median"] += 1_000
    (tmp_path / f"{benchmark}-20990101T000000Z.json").write_text(json.dumps(result))
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert report.PAGE.read_text() != report.page()


def test_every_result_names_its_machine_and_commit() -> None:
    for path in report.RESULTS.glob("*.json"):
        result = json.loads(path.read_text())
        assert result["machine"]["cpu"]
        assert result["machine"]["cores"] >= 1
        assert len(result["commit"].rstrip("+")) == 12


def test_the_plot_of_entities_is_made_from_the_newest_results() -> None:
    measured = report.newest("entities")
    drawn = report.ENTITIES_PLOT.read_text() if report.ENTITIES_PLOT.exists() else None
    assert drawn == (report.entities_plot(measured["runs"]) if measured else None)


def test_a_plot_shows_each_size() -> None:
    runs = [{"entities": 10**n, "us_per_event": n / 3, "bytes_per_entity": 700} for n in (3, 6)]
    drawn = report.entities_plot(runs)
    assert all(text in drawn for text in (">1k<", ">1M<", ">1.00<", ">2.00<", ">700<"))
