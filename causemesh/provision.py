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
from causemesh.errors import MeshError, Retryable
from causemesh.settings import ServiceSettings
from causemesh.telemetry import configure_logging

_log = structlog.get_logger(__name__)
_ATTEMPTS = 30


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


async def provision(settings: ServiceSettings, attempts: int = _ATTEMPTS) -> None:
    """Do both for the mesh that the settings name, waiting for servers that start beside us.

    Raises Retryable when they don't come, Misdeclared when the registry refuses a schema.
    """
    catalogue = Catalogue.load(
        [settings.project] if settings.project else [], partitions=settings.partitions
    )
    for left in reversed(range(attempts)):
        try:
            await _once(settings, catalogue)
            return
        except Retryable as error:
            if not left:
                raise
            _log.info("waiting", reason=str(error))
            await asyncio.sleep(error.retry_after)


async def _once(settings: ServiceSettings, catalogue: Catalogue) -> None:
    bus = open_bus(settings)
    registry = HttpRegistry(settings.registry_url)
    admin = bus.admin()
    try:
        made = await create_topics(catalogue, admin)
        subjects = await register(catalogue, registry)
        _log.info("provisioned", topics_created=len(made), subjects=len(subjects))
    finally:
        await admin.close()
        await registry.close()
        await bus.close()


def main() -> None:
    """Exit status 0 when all is there, else 1 with the reason on a line."""
    settings = ServiceSettings()
    configure_logging("provision", level=settings.log_level, form=settings.log_format)
    try:
        asyncio.run(provision(settings))
    except MeshError as error:
        _log.error("provisioning_failed", reason=str(error))
        sys.exit(1)


if __name__ == "__main__":
    main()
