"""One service, whole and as it ships, over what lies in its topics: prints what it took.

usage: python -m benchmarks.service_run features --group features --records 1200000 --warm 200000

The service is told by CAUSEMESH_* where it works. Time is counted from the end of the unit of work
that passed `--warm` records to the end of the one that reached `--records`, each with its commit if
one was due. Then the service is stopped as a supervisor stops it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from causemesh import service
from causemesh.runner.observer import UnitReport
from causemesh.runner.stage import Stage
from causemesh.telemetry import Metrics


@dataclass(frozen=True)
class At:
    """A moment of the run."""

    records: int
    seconds: float
    cpu_seconds: float


class TimedMetrics(Metrics):
    """Metrics that also note when a group passed two counts of records."""

    group = ""
    warm = records = 0

    def __init__(self) -> None:
        super().__init__()
        self._seen = 0
        self._began: At | None = None

    def unit_done(self, stage: Stage, partition: int, report: UnitReport) -> None:
        """See `Observer.unit_done`."""
        super().unit_done(stage, partition, report)
        if stage.group != self.group:
            return
        self._seen += report.records
        now = At(self._seen, time.perf_counter(), time.process_time())
        if self._began is None and self._seen >= self.warm:
            self._began = now
        if self._began is not None and self._seen >= self.records:
            self._tell(self._began, now)

    def _tell(self, began: At, ended: At) -> None:
        figures = {
            "records": ended.records - began.records,
            "seconds": ended.seconds - began.seconds,
            "cpu_seconds": ended.cpu_seconds - began.cpu_seconds,
            "peak_rss_mb": peak_rss_mb(),
        }
        print(json.dumps({"figures": figures}), flush=True)
        os.kill(os.getpid(), signal.SIGTERM)


def peak_rss_mb() -> float:
    """Most memory of this process so far; getrusage would count what its parent had at the fork."""
    told = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(told[1]) / 1000 if told else 0.0


def main() -> None:
    """Run the service until it has read all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("service")
    parser.add_argument("--group", required=True)
    parser.add_argument("--records", type=int, required=True)
    parser.add_argument("--warm", type=int, required=True)
    told = parser.parse_args()
    TimedMetrics.group, TimedMetrics.records, TimedMetrics.warm = (
        told.group,
        told.records,
        told.warm,
    )
    setattr(service, "Metrics", TimedMetrics)  # noqa: B010 - what it is to make its metrics with
    app = importlib.import_module(f"services.{told.service}.app")
    service.run_process(app.main)


if __name__ == "__main__":
    main()
