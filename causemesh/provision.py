"""Bring a broker and a registry in line with the catalogue; safe to run again."""

from __future__ import annotations

from causemesh.bus.base import Admin
from causemesh.catalogue import Catalogue
from causemesh.codec.registry import Registry


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
