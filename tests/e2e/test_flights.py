"""From real flights to finalised invoices: undisturbed, and with everything ended on the way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.servers, pytest.mark.timeout(900)]
HOME = Path(".causemesh-test-e2e")
SERVICES_KILLED = "ingest,features,inference,billing,drift,agents"
SERVERS_KILLED = "kafka,pause:features,postgres,pause:inference,triton,pause:ingest"
EQUAL = ("digest_predictions", "digest_invoices", "rejects", "auc", "drift_alerts", "reviews")


def demo(disturbed: str = "") -> dict[str, Any]:
    """Run the demo over one month in a process of its own; returns its summary."""
    environment = {
        **os.environ,
        "CAUSEMESH_HOME": str(HOME),
        "DEMO_MONTHS": "1",
        "DEMO_EXIT": "1",
        "DEMO_KILL": disturbed,
    }
    argv = [sys.executable, "-m", "examples.flights.demo"]
    done = subprocess.run(
        argv,
        env=environment,
        check=False,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    for name in filter(None, disturbed.split(",")):
        kind, _, what = name.rpartition(":")
        assert f"{kind or 'kill -9'}: {what}" in done.stdout
    summary: dict[str, Any] = json.loads((HOME / "demo-summary.json").read_text())
    return summary


@pytest.fixture(scope="module")
def calm() -> dict[str, Any]:
    """The summary of an undisturbed run."""
    return demo()


def test_every_check_of_the_demo_passes(calm: dict[str, Any]) -> None:
    assert calm["passed"], calm["checks"]
    assert calm["requests"] == calm["outcomes"]["predicted"] == 27_004


@pytest.mark.parametrize(
    "disturbed", [SERVICES_KILLED, SERVERS_KILLED], ids=["services", "servers"]
)
def test_what_is_killed_or_paused_changes_nothing(calm: dict[str, Any], disturbed: str) -> None:
    """Every check passes again, and what comes out is the same bit for bit."""
    summary = demo(disturbed)
    assert summary["passed"], summary["checks"]
    assert {name: summary[name] for name in EQUAL} == {name: calm[name] for name in EQUAL}
