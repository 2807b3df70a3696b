"""Starting and stopping a local mesh."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from causemesh.catalogue import LAKE, SERVICES, TRANSFORMS, Catalogue
from causemesh.derived import require_faust
from causemesh.errors import Misdeclared
from causemesh.lake import require_libraries
from causemesh.lake.definitions import LAKE_FILE
from causemesh.local import Cluster, Endpoints
from causemesh.local.cluster import ALL_SERVERS
from causemesh.local.mesh import Mesh, mesh_of
from causemesh.provision import provision
from causemesh.settings import BusName, ServiceSettings

Progress = Callable[[str, str], None]
DEMO = "examples.flights.demo"
_PARTITIONS = "CAUSEMESH_PARTITIONS"
_BUS = "CAUSEMESH_BUS"
_BUSES = {"kafka", "pulsar"}


def servers(bus: str | None = None) -> tuple[str, ...]:
    """The servers to run: one broker, and no Stripe stand-in when there is a Stripe key.

    The broker is `bus`, else the one that CAUSEMESH_BUS names.
    """
    left_out = _BUSES - {bus or ServiceSettings().bus}
    if "CAUSEMESH_STRIPE_KEY" in os.environ:
        left_out.add("stripe")
    return tuple(name for name in ALL_SERVERS if name not in left_out)


def bus_of(home: Path) -> str:
    """The broker of a home folder: of the mesh that was started there, else CAUSEMESH_BUS."""
    mesh = mesh_of(home)
    return ServiceSettings().bus if mesh is None else mesh.extra.get(_BUS, "kafka")


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
    services = processes(project)
    settings = ServiceSettings()
    endpoints = Cluster(home, servers(settings.bus)).up(progress)
    mesh = Mesh(home, endpoints, project, services)
    mesh.extra[_BUS] = settings.bus
    progress("topics", "declaring")
    asyncio.run(provision(settings_on(endpoints, project, settings.bus, partitions)))
    if partitions is not None:
        mesh.extra[_PARTITIONS] = str(partitions)
    mesh.up(progress)
    return mesh


def processes(project: Path) -> tuple[str, ...]:
    """What to run: the services, and what the project asks for: the lake's writer, its transforms.

    CAUSEMESH_LAKE=off leaves the writer out. Raises Misdeclared when an extra is not installed, or
    the broker is none for transforms.
    """
    wanted = os.environ.get("CAUSEMESH_LAKE", "on")
    if wanted not in ("on", "off"):
        raise Misdeclared(f"CAUSEMESH_LAKE must be on or off, not {wanted!r}")
    chosen = list(SERVICES)
    if wanted == "on" and (project / LAKE_FILE).exists():
        require_libraries()
        chosen.append(LAKE)
    if Catalogue.load([project]).transforms:
        require_faust(ServiceSettings().bus)
        chosen.append(TRANSFORMS)
    return tuple(chosen)


def settings_on(
    endpoints: Endpoints, project: Path, bus: BusName, partitions: int | None
) -> ServiceSettings:
    """How to reach local servers and what to declare on them."""
    return ServiceSettings(
        bus=bus,
        kafka_bootstrap=endpoints.kafka_bootstrap,
        pulsar_url=endpoints.pulsar_url,
        pulsar_admin_url=endpoints.pulsar_admin_url,
        registry_url=endpoints.registry_url,
        project=project,
        partitions=partitions,
    )


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
        found += Cluster(home, servers(bus_of(home))).status()
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
