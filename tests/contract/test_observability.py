"""Rules and dashboards name only metrics that the code exports; promtool proves the rules."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from causemesh.telemetry import Metrics

_DEPLOY = Path(__file__).parents[2] / "deploy"
_RULES = _DEPLOY / "prometheus" / "rules.yml"
_DASHBOARDS = sorted((_DEPLOY / "grafana" / "dashboards").glob("*.json"))


def _exported() -> set[str]:
    names: set[str] = set()
    for family in Metrics().registry.collect():
        suffixes = {
            "counter": ("_total",),
            "gauge": ("",),
            "histogram": ("_bucket", "_sum", "_count"),
        }[family.type]
        names.update(family.name + suffix for suffix in suffixes)
    return names


def _unknown(expressions: list[str]) -> set[str]:
    used = {name for text in expressions for name in re.findall(r"\bcausemesh_\w+", text)}
    assert used
    return used - _exported()


def _rule_expressions() -> list[str]:
    groups = yaml.safe_load(_RULES.read_text())["groups"]
    return [rule["expr"] for group in groups for rule in group["rules"]]


def _promtool(folder: Path) -> Path:
    """The promtool of this machine, else Debian's, unpacked and not installed."""
    found = shutil.which("promtool")
    if found:
        return Path(found)
    kept = Path.home() / ".cache" / "causemesh" / "promtool"
    if not kept.exists():
        download = ["apt-get", "download", "prometheus"]
        if subprocess.run(download, cwd=folder, check=False).returncode:
            # A new machine has no package lists yet.
            subprocess.run(["apt-get", "update"], check=True)
            subprocess.run(download, cwd=folder, check=True)
        (package,) = folder.glob("prometheus_*.deb")
        subprocess.run(["dpkg-deb", "-x", package, folder / "unpacked"], check=True)
        kept.parent.mkdir(parents=True, exist_ok=True)
        # Renamed into place: another run never meets half a program.
        fresh = kept.with_name(f"promtool.{folder.name}")
        shutil.copy2(folder / "unpacked" / "usr" / "bin" / "promtool", fresh)
        fresh.rename(kept)
    return kept


def _test_rules(promtool: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [promtool, "test", "rules", "rules_test.yml"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_rules_name_exported_metrics() -> None:
    assert _unknown(_rule_expressions()) == set()


@pytest.mark.parametrize("path", _DASHBOARDS, ids=lambda path: path.stem)
def test_dashboards_name_exported_metrics(path: Path) -> None:
    panels = json.loads(path.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert _unknown([t["expr"] for panel in panels for t in panel["targets"]]) == set()


def test_a_metric_that_nobody_exports_is_found() -> None:
    assert _unknown(["rate(causemesh_made_up_total[5m])"]) == {"causemesh_made_up_total"}


def test_every_alert_has_tests() -> None:
    tests = (_RULES.parent / "rules_test.yml").read_text()
    alerts = {r["alert"] for g in yaml.safe_load(_RULES.read_text())["groups"] for r in g["rules"]}
    for alert in alerts:
        assert f"{alert} fires" in tests
        assert f"{alert} stays quiet" in tests


def test_promtool_passes_the_rules_and_fails_broken_ones(tmp_path: Path) -> None:
    promtool = _promtool(tmp_path)
    passed = _test_rules(promtool, _RULES.parent)
    assert passed.returncode == 0, passed.stdout + passed.stderr
    (tmp_path / "rules.yml").write_text(_RULES.read_text().replace("== 0", "== 2"))
    shutil.copy(_RULES.parent / "rules_test.yml", tmp_path)
    assert _test_rules(promtool, tmp_path).returncode != 0
