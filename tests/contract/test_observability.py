"""Rules and dashboards name only metrics that the code exports; promtool proves the rules."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from causemesh.telemetry import Metrics
from services.billing.reporting import BillingMetrics
from tests.triton_metrics import TRITON, TRITON_GPU

_DEPLOY = Path(__file__).parents[2] / "deploy"
_RULES = _DEPLOY / "prometheus" / "rules.yml"
_DASHBOARDS = sorted((_DEPLOY / "grafana" / "dashboards").glob("*.json"))


def _families() -> dict[str, set[str]]:
    """The names of each exported metric's series."""
    families = {}
    metrics = Metrics()
    BillingMetrics(metrics.registry)
    for family in metrics.registry.collect():
        suffixes = {
            "counter": ("_total",),
            "gauge": ("",),
            "histogram": ("_bucket", "_sum", "_count"),
        }[family.type]
        families[family.name] = {family.name + suffix for suffix in suffixes}
    return families


def _used(expressions: list[str]) -> set[str]:
    return {name for text in expressions for name in re.findall(r"\b(?:causemesh|nv)_\w+", text)}


def _unknown(expressions: list[str]) -> set[str]:
    used = _used(expressions)
    assert used
    return used - set().union(*_families().values()) - TRITON - TRITON_GPU


def _panels(path: Path) -> list[dict[str, Any]]:
    panels: list[dict[str, Any]] = json.loads(path.read_text())["panels"]
    return panels


def _shown(path: Path) -> list[str]:
    """Every expression of a dashboard."""
    return [target["expr"] for panel in _panels(path) for target in panel["targets"]]


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
    panels = _panels(path)
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert _unknown(_shown(path)) == set()


def test_dashboards_have_names_of_their_own() -> None:
    boards = [json.loads(path.read_text()) for path in _DASHBOARDS]
    assert len({board["uid"] for board in boards}) == len(boards)


@pytest.mark.parametrize(
    "name", ["causemesh_made_up_total", "causemesh_unit_seconds", "nv_gpu_utilisation"]
)
def test_a_metric_that_nobody_exports_is_found(name: str) -> None:
    assert _unknown([f"rate({name}[5m])", "causemesh_lag_records"]) == {name}


def _hidden(expressions: list[str]) -> set[str]:
    used = _used(expressions)
    return {name for name, series in _families().items() if not series & used}


def test_every_exported_metric_is_on_a_dashboard() -> None:
    shown = [expression for path in _DASHBOARDS for expression in _shown(path)]
    assert _hidden(shown) == set()
    assert "nv_gpu_utilization" in _used(shown)
    without = [text for text in shown if "causemesh_lag_records" not in text]
    assert _hidden(without) == {"causemesh_lag_records"}


def _check_syntax(promtool: Path, folder: Path, expressions: list[str]) -> int:
    rules = [{"record": f"panel:{n}", "expr": text} for n, text in enumerate(expressions)]
    file = folder / "panels.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    return subprocess.run([promtool, "check", "rules", file], check=False).returncode


@pytest.mark.parametrize("path", _DASHBOARDS, ids=lambda path: path.stem)
def test_promtool_reads_every_panel(path: Path, tmp_path: Path) -> None:
    promtool = _promtool(tmp_path)
    assert _check_syntax(promtool, tmp_path, _shown(path)) == 0
    assert _check_syntax(promtool, tmp_path, [*_shown(path), "rate(up)"]) != 0


def test_every_alert_has_tests() -> None:
    tests = (_RULES.parent / "rules_test.yml").read_text()
    alerts = {r["alert"] for g in yaml.safe_load(_RULES.read_text())["groups"] for r in g["rules"]}
    for alert in alerts:
        assert f"{alert} fires" in tests
        assert f"{alert} stays quiet" in tests


def test_promtool_passes_the_rules(tmp_path: Path) -> None:
    passed = _test_rules(_promtool(tmp_path), _RULES.parent)
    assert passed.returncode == 0, passed.stdout + passed.stderr


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("== 0", "== 2"),
        ('status="mismatch"}) > 0', 'status="mismatch"}) > 1'),
        ('status="mismatch"}) > 0', 'status="finalised"}) > 0'),
        ("max(causemesh_billing_invoices", "(causemesh_billing_invoices"),
        ("min_over_time(", "max_over_time("),
        ("oldest_seconds > 60", "oldest_seconds > 6000"),
        ("oldest_seconds > 60", "oldest_seconds > 6"),
        ('outcome="different"', 'outcome="same"'),
    ],
)
def test_promtool_fails_broken_rules(right: str, wrong: str, tmp_path: Path) -> None:
    rules = _RULES.read_text()
    assert right in rules
    (tmp_path / "rules.yml").write_text(rules.replace(right, wrong))
    shutil.copy(_RULES.parent / "rules_test.yml", tmp_path)
    assert _test_rules(_promtool(tmp_path), tmp_path).returncode != 0
