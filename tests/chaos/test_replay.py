"""A short replay of real flights under everything at once, against the undisturbed run."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from causemesh.faultpoints import Point

pytestmark = [pytest.mark.servers, pytest.mark.timeout(900)]
HOME = Path(".causemesh-test-chaos")
SERVICES = ("ingest", "features", "inference", "billing", "drift", "agents")
SERVERS = "kafka,restart:kafka,postgres,restart:postgres,triton"
PAUSES = ",".join(f"pause:{name}" for name in ("ingest", "features", "inference", "billing"))
STRIPE = "stripe:timeout,stripe:500,stripe:500-after,stripe:429"
SEED = int(os.environ.get("CHAOS_SEED") or random.randrange(2**32))
KILLS = int(os.environ.get("CHAOS_KILLS", "20"))
DAYS = os.environ.get("CHAOS_DAYS", "10")
EQUAL = ("digest_predictions", "digest_invoices", "outcomes", "rejects", "reviews", "drift_alerts")


def random_kills() -> str:
    return ",".join(random.Random(SEED).choices(SERVICES, k=KILLS))


def replay(disturbed: str = "") -> dict[str, Any]:
    """The demo over a few days in a process of its own; returns its summary."""
    environment = {
        **os.environ,
        "CAUSEMESH_HOME": str(HOME),
        "DEMO_MONTHS": "1",
        "DEMO_DAYS": DAYS,
        "DEMO_EXIT": "1",
        "DEMO_KILL": disturbed,
    }
    argv = [sys.executable, "-m", "examples.flights.demo"]
    done = subprocess.run(argv, env=environment, check=False, text=True, capture_output=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    summary: dict[str, Any] = json.loads((HOME / "demo-summary.json").read_text())
    return summary


@pytest.fixture(scope="module")
def calm() -> dict[str, Any]:
    """The summary of an undisturbed run."""
    return replay()


@pytest.mark.parametrize(
    "disturbed",
    [
        random_kills(),
        SERVERS,
        PAUSES,
        STRIPE,
        # ingest, inference, features and billing each end themselves at every step of theirs
        ",".join(f"fault:{point}" for point in Point),
    ],
    ids=["kills", "servers", "pauses", "stripe", "points"],
)
def test_nothing_that_happens_changes_the_results(calm: dict[str, Any], disturbed: str) -> None:
    """Every check of the demo passes (one outcome a request, invoices equal to a recount to the
    cent), what comes out is the same bit for bit, and each kill, restart and fault
    point did happen (pauses and Stripe's faults leave no trace that is looked for)."""
    print(f"CHAOS_SEED={SEED}: {disturbed}")
    summary = replay(disturbed)
    assert summary["passed"], summary["checks"]
    assert {name: summary[name] for name in EQUAL} == {name: calm[name] for name in EQUAL}
    for one in summary["recoveries"]:
        print(f"  {one['what']}: ready again after {one['ready_s']:.1f} s")
    timed = [name for name in disturbed.split(",") if not name.startswith(("pause:", "stripe:"))]
    assert sorted(one["what"] for one in summary["recoveries"]) == sorted(timed)
