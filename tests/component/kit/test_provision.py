"""Provisioning a real broker and registry: safe to run again, and the registry holds the line."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from causemesh.bus.kafka import KafkaBus
from causemesh.catalogue import Catalogue
from causemesh.codec.registry import HttpRegistry
from causemesh.errors import Misdeclared
from causemesh.provision import create_topics, register

pytestmark = pytest.mark.servers
CATALOGUE = Catalogue.load([Path(__file__).parents[2] / "project"])


@pytest.fixture
async def registry(registry_url: str) -> AsyncIterator[HttpRegistry]:
    made = HttpRegistry(registry_url)
    yield made
    await made.close()


async def test_registering_again_changes_nothing(registry: HttpRegistry, registry_url: str) -> None:
    async with httpx.AsyncClient(base_url=registry_url) as client:

        async def versions(subject: str) -> Any:
            answer = await client.get(f"/subjects/{quote(subject)}/versions")
            return answer.raise_for_status().json()

        first = await register(CATALOGUE, registry)
        before = {subject: await versions(subject) for subject in first}
        assert await register(CATALOGUE, registry) == first
        assert {subject: await versions(subject) for subject in first} == before
        for subject in first:
            level = (await client.get(f"/config/{quote(subject)}")).raise_for_status().json()
            assert level["compatibilityLevel"] == "FULL_TRANSITIVE", subject


async def test_the_registry_refuses_what_readers_could_not_follow(registry: HttpRegistry) -> None:
    await register(CATALOGUE, registry)
    topic = CATALOGUE.topic("inference.predictions.v1")
    fields = topic.record["fields"]
    needed = {"name": "needed", "type": "long"}
    with pytest.raises(Misdeclared, match=topic.subject):
        await registry.register(topic.subject, {**topic.record, "fields": [*fields, needed]})
    with pytest.raises(Misdeclared, match=topic.subject):
        await registry.register(topic.subject, {**topic.record, "fields": fields[1:]})


async def test_creating_topics_again_creates_none(kafka_bootstrap: str) -> None:
    bus = KafkaBus(kafka_bootstrap)
    admin = bus.admin()
    await create_topics(CATALOGUE, admin)
    assert await create_topics(CATALOGUE, admin) == []
    ends = await admin.ends(sorted(CATALOGUE.topics))
    assert {name for name, _ in ends} == set(CATALOGUE.topics)
    await admin.close()
    await bus.close()
