"""What each process of the mesh spends on a replay, and on how many units of work.

usage: python -m benchmarks.mesh_processes [--months 1] [--days N] [--one-version] [--home FOLDER]

Replays the flights example as the demo does and prints a table: processor seconds of every service,
every server and the demo's own process from ready to the last invoice, and by consumer group the
units of work, the records and the records a unit. Processor time is what can be compared on a
machine that does other work too; seconds are not.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.readings import own_ports
from causemesh.cli import running
from causemesh.cli.output import Output
from causemesh.local import Cluster
from causemesh.local.cluster import ServerStatus
from causemesh.local.mesh import Mesh
from examples.flights.demo import PROJECT, TRAINED_FROM, Demo, fresh_home

_PARTITIONS = 2
_BATCH = re.compile(r'causemesh_batch_records_(count|sum)\{group="([^"]+)"\} ([\d.e+]+)')
_UNIT_S = re.compile(r'causemesh_unit_seconds_sum\{group="([^"]+)"\} ([\d.e+]+)')


def spent(found: list[ServerStatus]) -> dict[str, float]:
    """Processor seconds so far by process name, with those of the children that run (Postgres has
    one a connection) and of those that ended."""
    seconds = {}
    for one in found:
        if one.pid is None:
            continue
        process = psutil.Process(one.pid)
        family = [process, *process.children(recursive=True)]
        times = [member.cpu_times() for member in family]
        ended = process.cpu_times()
        seconds[one.name] = (
            sum(each.user + each.system for each in times)
            + ended.children_user
            + ended.children_system
        )
    return seconds


def groups(mesh: Mesh) -> dict[str, dict[str, float]]:
    """Units, records and seconds of every consumer group, from the services' metrics."""
    found: dict[str, dict[str, float]] = {}
    for service in mesh.services:
        text = httpx.get(f"{mesh.url(service)}/metrics").text
        for kind, group, value in _BATCH.findall(text):
            name = "units" if kind == "count" else "records"
            found.setdefault(group, {})[name] = float(value)
        for group, value in _UNIT_S.findall(text):
            found.setdefault(group, {})["seconds"] = float(value)
    return found


class MeasuredDemo(Demo):
    """A demo that notes its processes' time when the last invoice is there."""

    def __init__(self, *told: Any, **named: Any) -> None:
        super().__init__(*told, **named)
        self.first: dict[str, float] = {}
        self.spent: dict[str, float] = {}
        self.groups: dict[str, dict[str, float]] = {}
        self.servers: Cluster | None = None

    def _now(self, mesh: Mesh) -> dict[str, float]:
        assert self.servers is not None
        return {
            **spent(mesh.status()),
            **spent(self.servers.status()),
            "demo": time.process_time(),
        }

    async def run(self, mesh: Mesh) -> dict[str, Any]:
        """See `Demo.run`."""
        self.first = self._now(mesh)
        return await super().run(mesh)

    async def replayed(self, mesh: Mesh) -> None:
        """See `Demo.replayed`."""
        last = self._now(mesh)
        self.spent = {name: last[name] - self.first.get(name, 0.0) for name in last}
        self.groups = groups(mesh)


def report(summary: Mapping[str, Any], demo: MeasuredDemo) -> dict[str, Any]:
    """The figures of one run."""
    records = summary["events"] + summary["requests"]
    return {
        "records": records,
        "predictions": summary["requests"],
        "seconds": summary["seconds"],
        "cpu_seconds": {name: round(value, 2) for name, value in demo.spent.items()},
        "services_cpu_us_per_record": round(
            sum(demo.spent[name] for name in demo.spent if name in _SERVICES) / records * 1e6, 1
        ),
        "groups": demo.groups,
        "digests": [summary["digest_predictions"], summary["digest_invoices"]],
        "passed": summary["passed"],
    }


_SERVICES = ("ingest", "features", "inference", "billing", "drift", "agents")


def show(figures: Mapping[str, Any]) -> None:
    """Print the figures as tables."""
    print(f"{figures['records']:,} records, {figures['predictions']:,} predictions,", end=" ")
    print(f"seconds {figures['seconds']}, digests {figures['digests']}, {figures['passed']=}")
    whole = 0.0
    for name, value in sorted(figures["cpu_seconds"].items(), key=lambda one: -one[1]):
        whole += value
        print(f"  {name:24}{value:8.2f} s")
    print(f"  {'all':24}{whole:8.2f} s; services {figures['services_cpu_us_per_record']} us/record")
    for group, told in sorted(figures["groups"].items()):
        units, count = told.get("units", 0), told.get("records", 0)
        mean = count / units if units else 0
        print(
            f"  {group:32}{units:8,.0f} units {count:10,.0f} records {mean:8.1f} a unit"
            f" {told.get('seconds', 0):8.2f} s in units"
        )


def main() -> None:
    """Replay once and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--months", type=int, default=1)
    parser.add_argument("--days", type=int)
    parser.add_argument("--one-version", action="store_true", help="train none on the way")
    parser.add_argument("--home", type=Path, default=Path(".causemesh-bench-mesh"))
    told = parser.parse_args()
    fresh_home(told.home)
    own_ports(told.home)
    since = None if told.one_version else TRAINED_FROM
    demo = MeasuredDemo(told.home, told.months, told.days, [], out=Output(), trained_from=since)
    try:
        mesh = running.up(told.home, PROJECT, lambda name, state: None, partitions=_PARTITIONS)
        demo.servers = Cluster(told.home, running.servers())
        summary = asyncio.run(demo.run(mesh))
    finally:
        running.down(told.home)
    figures = report(summary, demo)
    show(figures)
    (told.home / "processes.json").write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
