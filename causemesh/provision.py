"""Bring a broker and a registry in line with the catalogue; safe to run again.

usage: python -m causemesh.provision   (CAUSEMESH_* say which broker, registry and project)
"""

from __future__ import annotations

import asyncio
import sys

import structlog

from causemesh.bus.base import Admin
from causemesh.bus.opening import open_bus
from causemesh.catalogue import Catalogue
from causemesh.codec.registry import HttpRegistry, Registry
from causemesh.errors import MeshError
from causemesh.periodic import patiently
from causemesh.settings import ServiceSettings
from causemesh.telemetry import configure_logging

_log = structlog.get_logger(__name__)


async def register(catalogue: Catalogue, registry: Registry) -> dict[str, int]:
    """Register every topic's record under its subject; returns the ids by subject.

    Raises Misdeclared when a schema is not compatible with what is registered.
    """
    ids = {}
    for topic in catalogue.topics.values():
        ids[topic.subject] = await registry.register(topic.subject, topic.record)
        await registry.set_compatibility(topic.subject, topic.compatibility)
    for name, schema in catalogue.controls.items():
        ids[name] = await registry.register(name, schema)
        await registry.set_compatibility(name, "FULL_TRANSITIVE")
    return ids


async def create_topics(catalogue: Catalogue, admin: Admin) -> list[str]:
    """Create missing topics; returns their names."""
    return await admin.ensure(list(catalogue.topics.values()))


async def provision(settings: ServiceSettings) -> tuple[int, int]:
    """Do both for the mesh that the settings name; returns how many topics were created, and how
    many subjects are registered.

    Raises Retryable when a server is away, Misdeclared when the registry refuses a schema.
    """
    catalogue = Catalogue.load(
        [settings.project] if settings.project else [], partitions=settings.partitions
    )
    bus = open_bus(settings)
    registry = HttpRegistry(settings.registry_url)
    admin = bus.admin()
    try:
        made = await create_topics(catalogue, admin)
        return len(made), len(await register(catalogue, registry))
    finally:
        await admin.close()
        await registry.close()
        await bus.close()


def main() -> None:
    """Exit status 0 when all is there, else 1 with the reason on a line."""
    settings = ServiceSettings()
    configure_logging("provision", level=settings.log_level, form=settings.log_format)
    try:
        made, subjects = asyncio.run(patiently(lambda: provision(settings)))
        _log.info("provisioned", topics_created=made, subjects=subjects)
    except MeshError as error:
        _log.error("provisioning_failed", reason=str(error))
        sys.exit(1)


if __name__ == "__main__":
    main()
