"""What the whole mesh costs against the work it is given: 1, 4 and 16 times the events.

usage: python -m benchmarks.mesh_cost_by_work [--days 10 40 160]

Replays the flights example, from raw events to finalised invoices, with the demo's own checks. One
run a size, and the largest once more with one model version: else the replay waits while a second
one is trained, which is no work of the mesh. Processor time is that of all six services, and apart
from it that of the servers, from ready to the end of the checks.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import threading
import time
from collections.abc import Callable
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import psutil

from benchmarks.harness import save, versions
from benchmarks.readings import own_ports
from causemesh.cli import running
from causemesh.cli.output import Output
from causemesh.local import Cluster
from causemesh.local.artefacts import KAFKA
from causemesh.local.cluster import ServerStatus
from causemesh.local.mesh import Mesh
from examples.flights.demo import PROJECT, TRAINED_FROM, Demo, fresh_home

_HOME = Path(".causemesh-bench-mesh")
_PARTITIONS = 2
_SAMPLE_S = 0.5


class Usage:
    """Processor seconds and peak memory of some processes, sampled until stopped."""

    def __init__(self, processes: Callable[[], list[ServerStatus]]) -> None:
        self._processes = processes
        self._first: dict[int, float] = {}
        self._last: dict[int, float] = {}
        self.peak_rss_mb = 0.0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        while not self._stopping.wait(_SAMPLE_S):
            self._once()

    def _once(self) -> None:
        found = self._processes()
        for one in found:
            if one.pid is None:
                continue
            try:
                times = psutil.Process(one.pid).cpu_times()
            except psutil.NoSuchProcess:  # it ended between two looks
                continue
            spent = times.user + times.system
            self._first.setdefault(one.pid, spent)
            self._last[one.pid] = spent
        self.peak_rss_mb = max(self.peak_rss_mb, sum(one.rss_bytes for one in found) / 1e6)

    def stop(self) -> float:
        """Processor seconds spent since the start."""
        self._stopping.set()
        self._thread.join()
        self._once()
        return sum(self._last[pid] - first for pid, first in self._first.items())


def months_of(days: int) -> int:
    """The months of 2013 that the first `days` days touch."""
    return (date(2013, 1, 1) + timedelta(days=days)).month


def replay(days: int, *, trains: bool) -> dict[str, Any]:
    """One replay on empty data, in which a version is trained or not.

    Raises RuntimeError when a check of the demo fails.
    """
    fresh_home(_HOME)
    own_ports(_HOME)
    since = TRAINED_FROM if trains else None
    demo = Demo(_HOME, months_of(days), days, [], out=Output(), trained_from=since)
    try:
        mesh: Mesh = running.up(_HOME, PROJECT, lambda name, state: None, partitions=_PARTITIONS)
        services = Usage(mesh.status)
        servers = Usage(Cluster(_HOME, running.servers()).status)
        began = time.monotonic()
        summary = asyncio.run(demo.run(mesh))
        took = time.monotonic() - began
        spent, spent_by_servers = services.stop(), servers.stop()
    finally:
        running.down(_HOME)
    failed = [check["name"] for check in summary["checks"] if not check["passed"]]
    if failed:
        raise RuntimeError(f"{days} days: these checks failed: {failed}")
    records = summary["events"] + summary["requests"]
    seconds = summary["seconds"]["replay"]
    return {
        "days": days,
        "trains": trains,
        "records": records,
        "predictions": summary["requests"],
        "invoices": len(summary["invoices"]),
        "replay_seconds": seconds,
        "training_seconds": summary["seconds"].get("training", 0.0),
        "whole_seconds": round(took, 1),
        "records_per_second": round(records / seconds),
        "predictions_per_second": round(summary["requests"] / seconds),
        "services_cpu_seconds": round(spent, 1),
        "servers_cpu_seconds": round(spent_by_servers, 1),
        "services_cpu_us_per_record": round(spent / records * 1e6),
        "services_peak_rss_mb": round(services.peak_rss_mb),
        "servers_peak_rss_mb": round(servers.peak_rss_mb),
    }


def main() -> None:
    """Replay each size, write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--days", type=int, nargs="+", default=[10, 40, 160])
    told = parser.parse_args()
    runs = []
    for days, trains in [*((days, True) for days in told.days), (max(told.days), False)]:
        runs.append(replay(days, trains=trains))
        print(runs[-1], flush=True)
    shutil.rmtree(_HOME, ignore_errors=True)
    of = {**versions("polars", "aiokafka"), "kafka": KAFKA}
    save("mesh", {"runs": runs}, about={"rounds": 1, "partitions": _PARTITIONS}, of=of)


if __name__ == "__main__":
    main()
