"""The real registry: ids, compatibility, and what it says no to."""

from __future__ import annotations

import uuid
from typing import Any

import pytest

from causemesh.catalogue import Catalogue
from causemesh.codec.registry import HttpRegistry, UnknownSchema
from causemesh.errors import Misdeclared
from causemesh.provision import register

pytestmark = pytest.mark.servers


def record(*fields: dict[str, Any]) -> dict[str, Any]:
    return {"type": "record", "name": "Thing", "namespace": "t", "fields": list(fields)}


A = {"name": "a", "type": "string"}
B = {"name": "b", "type": ["null", "long"], "default": None}


async def test_compatible_changes_pass_and_others_are_refused(registry_url: str) -> None:
    registry = HttpRegistry(registry_url)
    subject = f"t-{uuid.uuid4().hex}"
    first = await registry.register(subject, record(A))
    await registry.set_compatibility(subject, "FULL_TRANSITIVE")
    assert await registry.register(subject, record(A)) == first
    second = await registry.register(subject, record(A, B))
    assert second != first
    assert (await registry.schema(second))["fields"][1]["name"] == "b"
    with pytest.raises(Misdeclared, match="refuses"):
        await registry.register(subject, record(A, {"name": "c", "type": "long"}))
    await registry.close()


async def test_an_unknown_id_is_unknown(registry_url: str) -> None:
    registry = HttpRegistry(registry_url)
    with pytest.raises(UnknownSchema):
        await registry.schema(2_000_000)
    await registry.close()


async def test_the_whole_catalogue_registers_twice_with_the_same_ids(registry_url: str) -> None:
    registry = HttpRegistry(registry_url)
    catalogue = Catalogue.load()
    first = await register(catalogue, registry)
    assert await register(catalogue, registry) == first
    assert set(first) == {topic.subject for topic in catalogue.topics.values()} | {
        "causemesh.Watermark"
    }
    await registry.close()
