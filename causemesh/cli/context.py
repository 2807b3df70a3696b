"""What every command works on: the home folder, its mesh, and connections to it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import httpx

from causemesh.bus.base import Bus
from causemesh.bus.opening import open_bus
from causemesh.catalogue import SERVICES, Catalogue
from causemesh.codec.decode import Decoder
from causemesh.codec.registry import HttpRegistry
from causemesh.errors import Misdeclared
from causemesh.local.mesh import Mesh, mesh_of
from causemesh.log import LogReader
from causemesh.settings import API_PORTS, ServiceSettings
from causemesh.trace import Tracer


@dataclass(frozen=True)
class Connections:
    """Open connections to a mesh."""

    settings: ServiceSettings
    catalogue: Catalogue
    bus: Bus
    registry: HttpRegistry
    decoder: Decoder
    log: LogReader
    tracer: Tracer


class Apis(Protocol):
    """The admin APIs of a mesh's services."""

    services: tuple[str, ...]

    def client(self, service: str) -> httpx.Client:
        """An HTTP client for one of them, with the token."""


class ApisElsewhere:
    """The services of a mesh that this machine did not start, such as one in containers."""

    services: tuple[str, ...] = SERVICES

    def __init__(self, settings: ServiceSettings) -> None:
        self._address = settings.service_url
        self._token = settings.token()

    def client(self, service: str) -> httpx.Client:
        """See `Apis.client`."""
        return httpx.Client(
            base_url=self._address.format(service=service, port=API_PORTS[service]),
            headers={"Authorization": f"Bearer {self._token}"},
            timeout=60.0,
        )


def apis_at(home: Path) -> Apis:
    """The APIs of the mesh under `home`, else of the one that the environment names. Raises
    Misdeclared when it names none."""
    mesh = mesh_of(home)
    if mesh is not None:
        return mesh
    settings = ServiceSettings()
    if not settings.api_token.get_secret_value():
        raise Misdeclared(
            f"no mesh runs from {home}; start one with: causemesh up --project <dir>, or set"
            " CAUSEMESH_API_TOKEN to the token of one that runs elsewhere"
        )
    return ApisElsewhere(settings)


def mesh_at(home: Path) -> Mesh:
    """The local mesh of a home folder. Raises Misdeclared when there is none."""
    mesh = mesh_of(home)
    if mesh is None:
        raise Misdeclared(f"no mesh runs from {home}; start one with: causemesh up --project <dir>")
    return mesh


def settings_at(home: Path) -> ServiceSettings:
    """The settings of the mesh under `home`, else those of the CAUSEMESH_* environment."""
    mesh = mesh_of(home)
    if mesh is None:
        return ServiceSettings()
    prefix = "CAUSEMESH_"
    told = {name.removeprefix(prefix).lower(): value for name, value in mesh.environment().items()}
    return ServiceSettings.model_validate(told)


@asynccontextmanager
async def connections(home: Path) -> AsyncIterator[Connections]:
    """Connect to the mesh under `home` (or of the environment); closes all at the end."""
    settings = settings_at(home)
    projects = [settings.project] if settings.project else []
    catalogue = Catalogue.load(projects, partitions=settings.partitions)
    bus = open_bus(settings)
    registry = HttpRegistry(settings.registry_url)
    decoder = Decoder(registry)
    log = LogReader(bus, catalogue, decoder)
    try:
        tracer = Tracer(bus, catalogue, decoder)
        yield Connections(settings, catalogue, bus, registry, decoder, log, tracer)
    finally:
        await registry.close()
        await bus.close()
