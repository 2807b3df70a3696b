"""What a live request costs each process in processor time, on the real servers.

usage: python -m benchmarks.request_cost [--rates 20 100] [--seconds 10] [--idle 8]

Starts the flights mesh, warms it, looks at it idle, then sends requests at each rate (at their due
times, whether or not earlier ones were answered) and prints, by process, milliseconds of processor
time a request: all of it, and what is above the idle rate. On a machine that does other work too,
processor time is what can be compared.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from benchmarks.latency import Probe
from benchmarks.mesh_processes import spent
from benchmarks.readings import own_ports
from causemesh.cli import running
from causemesh.local import Cluster
from causemesh.local.mesh import Mesh
from examples.flights import model, training
from examples.flights.demo import PROJECT

_HOME = Path(".causemesh-request-cost")
_PARTITIONS = 2
_WARM_S = 15
_SERVICES = ("ingest", "features", "inference")


class Meter:
    """Processor seconds of every process of a mesh."""

    def __init__(self, mesh: Mesh, servers: Cluster) -> None:
        self._mesh = mesh
        self._servers = servers

    def now(self) -> dict[str, float]:
        """Seconds so far."""
        return {
            **spent(self._mesh.status()),
            **spent(self._servers.status()),
            "client": time.process_time(),
        }

    def since(self, before: Mapping[str, float]) -> dict[str, float]:
        """Seconds since an earlier `now`."""
        return {name: value - before[name] for name, value in self.now().items()}


async def measure(mesh: Mesh, told: argparse.Namespace) -> None:
    """Print the idle rate, then each rate."""
    meter = Meter(mesh, Cluster(_HOME, running.servers()))
    probe = Probe(mesh)
    try:
        await probe.predictions(50, told.warm)
        before, began = meter.now(), time.monotonic()
        await asyncio.sleep(told.idle)
        lasted = time.monotonic() - began
        idle = {name: value / lasted for name, value in meter.since(before).items()}
        print("idle, ms of processor time a second:", flush=True)
        _show({name: value * 1000 for name, value in idle.items()})
        for rate in told.rates:
            before, began = meter.now(), time.monotonic()
            seen = await probe.predictions(rate, told.seconds)
            lasted = time.monotonic() - began
            took = meter.since(before)
            count = len(seen.due)
            latencies = [(seen.read[one] - seen.due[one]) / 1000 for one in seen.due]
            p50, p99 = np.percentile(latencies, [50, 99])
            print(f"{rate:g} requests/s: p50 {p50:.1f} ms, p99 {p99:.1f} ms; ms a request:")
            whole = {name: value / count * 1000 for name, value in took.items()}
            above = {name: whole[name] - idle[name] * lasted / count * 1000 for name in whole}
            _show(whole, above)
            path = [sum(one[name] for name in _SERVICES) for one in (whole, above)]
            print(f"  {'ingest + features + inference':32}{path[0]:8.2f}{path[1]:8.2f}", flush=True)
    finally:
        await probe.close()


def _show(*columns: Mapping[str, float]) -> None:
    for name in sorted(columns[0], key=lambda name: -columns[0][name]):
        print(f"  {name:32}" + "".join(f"{column[name]:8.2f}" for column in columns))


def main() -> None:
    """Start the mesh, measure, stop."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rates", type=float, nargs="+", default=[20, 100])
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--idle", type=float, default=8)
    parser.add_argument("--warm", type=float, default=_WARM_S)
    told = parser.parse_args()
    own_ports(_HOME)
    mesh = running.up(_HOME, PROJECT, lambda name, state: None, partitions=_PARTITIONS)
    try:
        training.register(mesh, 1, model.baseline_onnx())
        asyncio.run(measure(mesh, told))
    finally:
        running.down(_HOME)


if __name__ == "__main__":
    main()
