"""Starting and stopping a local mesh."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from causemesh.bus.kafka import KafkaBus
from causemesh.catalogue import Catalogue
from causemesh.codec.registry import HttpRegistry
from causemesh.errors import Misdeclared
from causemesh.local import Cluster, Endpoints
from causemesh.local.cluster import ALL_SERVERS
from causemesh.local.mesh import Mesh, mesh_of
from causemesh.provision import create_topics, register

Progress = Callable[[str, str], None]
DEMO = "examples.flights.demo"
_PARTITIONS = "CAUSEMESH_PARTITIONS"


def servers() -> tuple[str, ...]:
    """The servers to run: without the Stripe stand-in when there is a Stripe key."""
    real = "CAUSEMESH_STRIPE_KEY" in os.environ
    return tuple(name for name in ALL_SERVERS if not (real and name == "stripe"))


def up(home: Path, project: Path, progress: Progress, *, partitions: int | None = None) -> Mesh:
    """Start servers, topics, schemas and services; what runs already is left alone.

    `partitions` is the default partition count of topics; it can't change once they exist, so the
    one given at first is kept.
    """
    if not (project / "catalogue.yaml").exists():
        raise Misdeclared(f"{project} is no project: it has no catalogue.yaml")
    before = mesh_of(home)
    if partitions is None and before is not None and _PARTITIONS in before.extra:
        partitions = int(before.extra[_PARTITIONS])
    endpoints = Cluster(home, servers()).up(progress)
    mesh = Mesh(home, endpoints, project)
    progress("topics", "declaring")
    asyncio.run(provision(endpoints, project, partitions))
    if partitions is not None:
        mesh.extra[_PARTITIONS] = str(partitions)
    mesh.up(progress)
    return mesh


async def provision(endpoints: Endpoints, project: Path, partitions: int | None) -> None:
    """Create every topic and register every schema."""
    catalogue = Catalogue.load([project], partitions=partitions)
    bus = KafkaBus(endpoints.kafka_bootstrap)
    registry = HttpRegistry(endpoints.registry_url)
    admin = bus.admin()
    try:
        await create_topics(catalogue, admin)
        await register(catalogue, registry)
    finally:
        await admin.close()
        await registry.close()
        await bus.close()


def down(home: Path, progress: Progress = lambda name, state: None) -> None:
    """Stop services, then servers; nothing to stop is fine."""
    mesh = mesh_of(home)
    if mesh is not None:
        progress("services", "stopping")
        mesh.down()
    if (home / "ports.json").exists():
        progress("servers", "stopping")
        Cluster(home, ALL_SERVERS).down()


def status(home: Path) -> list[Mapping[str, Any]]:
    """A row a process."""
    found = []
    if (home / "ports.json").exists():
        found += Cluster(home, servers()).status()
    mesh = mesh_of(home)
    if mesh is not None:
        found += mesh.status()
    return [
        {
            "name": one.name,
            "state": "stopped" if one.pid is None else "running",
            "pid": one.pid,
            "port": one.port,
            "rss_mb": round(one.rss_bytes / 1e6),
            "uptime_s": round(one.uptime_s),
        }
        for one in found
    ]


def demo(home: Path, months: int, *, leave: bool) -> int:
    """Run the flights example's demo; returns its exit status."""
    environment = {**os.environ, "CAUSEMESH_HOME": str(home), "DEMO_MONTHS": str(months)}
    if leave:
        environment["DEMO_EXIT"] = "1"
    return subprocess.run([sys.executable, "-m", DEMO], env=environment, check=False).returncode
