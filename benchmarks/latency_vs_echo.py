"""Request to prediction over the topics beside a bare broker echo, in rounds.

usage: python -m benchmarks.latency_vs_echo [--rounds 3] [--seconds 8]

Each round is a run of `benchmarks.latency` in a process and a mesh of its own.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections import defaultdict

from benchmarks.harness import ROOT, save, spread, versions
from causemesh.local.artefacts import KAFKA

RATES = (20, 50, 100, 200)
_RATE = re.compile(r"^([\d.]+) requests/s")
_LINE = re.compile(r"^  (\S.*?)\s+([\d.]+)\s+([\d.]+)$")
_MEASURED = ("bare echo", "request to prediction")
Seen = dict[tuple[float, str], tuple[float, float]]


def one_round(seconds: float) -> Seen:
    """By rate and line, p50 and p99 in milliseconds. Raises RuntimeError when a line is missing."""
    argv = [sys.executable, "-m", "benchmarks.latency", "--seconds", str(seconds), "--rates"]
    done = subprocess.run(
        [*argv, *map(str, RATES)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    found = parsed(done.stdout)
    wanted = {(float(rate), name) for rate in RATES for name in _MEASURED}
    if done.returncode or not wanted <= found.keys():
        raise RuntimeError(f"the latency run failed:\n{done.stdout}{done.stderr[-3000:]}")
    print(done.stdout, flush=True)
    return found


def parsed(printed: str) -> Seen:
    """What `benchmarks.latency` printed."""
    found: Seen = {}
    rate = 0.0
    for line in printed.splitlines():
        if head := _RATE.match(line):
            rate = float(head[1])
        elif (told := _LINE.match(line)) and rate:
            found[(rate, told[1].strip())] = (float(told[2]), float(told[3]))
    return found


def main() -> None:
    """Run the rounds, write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8)
    told = parser.parse_args()
    taken: dict[tuple[float, str], list[tuple[float, float]]] = defaultdict(list)
    for _ in range(told.rounds):
        for key, figures in one_round(told.seconds).items():
            taken[key].append(figures)
    rows = [
        {
            "rate": rate,
            "name": name,
            "p50_ms": spread([p50 for p50, _ in values]),
            "p99_ms": spread([p99 for _, p99 in values]),
        }
        for (rate, name), values in taken.items()
    ]
    about = {"rounds": told.rounds, "seconds": told.seconds, "partitions": 2}
    save("latency", {"rows": rows}, about=about, of={**versions("aiokafka"), "kafka": KAFKA})


if __name__ == "__main__":
    main()
