"""What every benchmark with peers shares: interleaved rounds, medians, the machine, JSON.

An arm is a command. It prints one JSON object of figures as its last line; what it must have
processed is checked by whoever asked for it, so that a peer that lost records is no result.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
PEER_PYTHON = ROOT / ".venv-bench" / "bin" / "python"
_ARM_S = 400
Figures = dict[str, float]


@dataclass(frozen=True)
class Arm:
    """One side of a comparison.

    run: makes one measurement; settings: what a reader must know of its configuration; rate: the
    figure that arms are compared by.
    """

    name: str
    run: Callable[[], Figures]
    settings: Mapping[str, Any] = field(default_factory=dict)
    rate: str = "records_per_second"


def run_command(
    argv: Sequence[str | Path],
    environment: Mapping[str, str] | None = None,
    beside: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """The JSON object that a command prints last. Raises RuntimeError with its output otherwise.

    `beside` is called with the process id once it runs.
    """
    told = {**os.environ, **(environment or {})}
    with subprocess.Popen(
        [str(part) for part in argv],
        cwd=ROOT,
        env=told,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        if beside is not None:
            beside(process.pid)
        try:
            out, err = process.communicate(timeout=_ARM_S)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
    lines = [line for line in out.splitlines() if line.startswith("{") and '"figures"' in line]
    if process.returncode or not lines:
        raise RuntimeError(f"{argv} ended with {process.returncode}:\n{out[-3000:]}{err[-3000:]}")
    figures: dict[str, Any] = json.loads(lines[-1])["figures"]
    return figures


def rated(figures: Mapping[str, float]) -> Figures:
    """Figures with records a second, and a second of its own processor time."""
    rates = {"records_per_second": figures["records"] / figures["seconds"]}
    if figures.get("cpu_seconds"):
        rates["records_per_cpu_second"] = figures["records"] / figures["cpu_seconds"]
    return {**figures, **rates}


def rounds(arms: Sequence[Arm], count: int) -> dict[str, list[Figures]]:
    """Every arm once a round, in an order that is rotated by one each round."""
    found: dict[str, list[Figures]] = {arm.name: [] for arm in arms}
    for number in range(count):
        turn = number % len(arms)
        for arm in [*arms[turn:], *arms[:turn]]:
            figures = arm.run()
            found[arm.name].append(figures)
            print(f"  round {number + 1}  {arm.name:44}{figures[arm.rate]:>14,.1f}", flush=True)
    return found


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, least and most of the rounds, and all of them in order."""
    kept = [float(f"{value:.6g}") for value in values]
    return {
        "median": float(f"{statistics.median(kept):.6g}"),
        "min": min(kept),
        "max": max(kept),
        "rounds": kept,
    }


def table(arms: Sequence[Arm], found: Mapping[str, Sequence[Figures]]) -> list[dict[str, Any]]:
    """The arms with the spread of each of their figures."""
    return [
        {
            "name": arm.name,
            "settings": dict(arm.settings),
            "rate": arm.rate,
            "figures": {
                name: spread([one[name] for one in found[arm.name]]) for name in found[arm.name][0]
            },
        }
        for arm in arms
    ]


def machine() -> dict[str, Any]:
    """The processor, its cores, memory and the kernel's word on virtualisation."""
    info = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":", 1)[1].strip() for line in info if "model name" in line), "?")
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "python": sys.version.split()[0],
        "kernel": os.uname().release.split("-")[0],
    }


def commit() -> str:
    """The commit that was measured; "+" behind it when tracked files differed from it."""

    def git(*told: str) -> str:
        return subprocess.run(
            ["git", *told], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no")
    return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")


def versions(*names: str) -> dict[str, str]:
    """Versions of packages of this environment."""
    return {name: metadata.version(name) for name in names}


def peer_versions(*names: str) -> dict[str, str]:
    """Versions of packages of the peers' environment."""
    program = (
        "import json, sys; from importlib.metadata import version;"
        "print(json.dumps({'figures': {n: version(n) for n in sys.argv[1:]}}))"
    )
    return run_command([PEER_PYTHON, "-c", program, *names])


def save(
    benchmark: str,
    tables: Mapping[str, Any],
    *,
    about: Mapping[str, Any],
    of: Mapping[str, str],
) -> Path:
    """Write the results: `<benchmark>-<UTC time>.json`, the newest of which the docs show."""
    now = datetime.now(UTC)
    document = {
        "benchmark": benchmark,
        "measured_at": now.isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
        "versions": dict(of),
        "about": dict(about),
        **tables,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{benchmark}-{now:%Y%m%dT%H%M%SZ}.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    print(f"written to {path.relative_to(ROOT)}")
    return path


def show(arms: Sequence[Arm], found: Mapping[str, Sequence[Figures]]) -> None:
    """Print the arms side by side."""
    print(f"{'':46}{'median':>12}{'min':>12}{'max':>12}{'x ours':>9}")
    ours = spread([one[arms[0].rate] for one in found[arms[0].name]])["median"]
    for arm in arms:
        told = spread([one[arm.rate] for one in found[arm.name]])
        cells = "".join(f"{told[name]:>12,.0f}" for name in ("median", "min", "max"))
        print(f"{arm.name:46}{cells}{told['median'] / ours:>9.2f}")
