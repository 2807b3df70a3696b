"""docs/benchmarks.md says what the newest committed results say."""

from __future__ import annotations

import json

import pytest

from benchmarks import report


def test_the_page_is_made_from_the_newest_results() -> None:
    assert report.PAGE.read_text() == report.page(), "run make bench-docs"


def test_the_plot_is_made_from_the_newest_results() -> None:
    assert report.PLOT.read_text() == report.plot(report.newest("mesh")["runs"])


def test_another_figure_makes_another_page(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path_factory.mktemp("results")
    for name in ("features", "latency", "predictions", "usage", "mesh", "profiles"):
        result = dict(report.newest(name))
        if name == "usage":
            rate = result["arms"][0]["figures"]["records_per_second"]
            rate["median"] = rate["median"] + 1_000
        (folder / f"{name}-20990101T000000Z.json").write_text(json.dumps(result))
    monkeypatch.setattr(report, "RESULTS", folder)
    assert report.PAGE.read_text() != report.page()


def test_every_result_names_its_machine_and_commit() -> None:
    for path in report.RESULTS.glob("*.json"):
        result = json.loads(path.read_text())
        assert result["machine"]["cpu"]
        assert result["machine"]["cores"] >= 1
        assert len(result["commit"].rstrip("+")) == 12
