"""From real flights to finalised invoices, twice: undisturbed, and with services killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.servers, pytest.mark.timeout(900)]
KILLED = "ingest,features,inference,billing,drift,agents"


def demo(home: Path, kill: str = "") -> dict[str, Any]:
    """Run the demo over one month in a process of its own; returns its summary."""
    environment = {
        **os.environ,
        "CAUSEMESH_HOME": str(home),
        "DEMO_MONTHS": "1",
        "DEMO_EXIT": "1",
        "DEMO_KILL": kill,
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
    for name in kill.split(","):
        assert not name or f"kill -9: {name}" in done.stdout
    summary: dict[str, Any] = json.loads((home / "demo-summary.json").read_text())
    return summary


def test_kills_change_nothing() -> None:
    """Every check of the demo passes, and what comes out is the same bit for bit."""
    calm = demo(Path(".causemesh-test-e2e"))
    killed = demo(Path(".causemesh-test-e2e"), KILLED)
    for summary in (calm, killed):
        assert summary["passed"], summary["checks"]
        assert summary["requests"] == summary["outcomes"]["predicted"] == 27_004
    for name in ("digest_predictions", "digest_invoices", "rejects", "auc", "drift_alerts"):
        assert killed[name] == calm[name]
