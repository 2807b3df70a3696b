"""Provisioning a real broker and registry: safe to run again, and the registry holds the line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from causemesh.bus.kafka import KafkaBus
from causemesh.catalogue import Catalogue
from causemesh.codec.registry import HttpRegistry
from causemesh.errors import Misdeclared, Retryable
from causemesh.local import Endpoints
from causemesh.periodic import patiently
from causemesh.provision import create_topics, provision, register
from causemesh.settings import ServiceSettings

pytestmark = pytest.mark.servers
PROJECT = Path(__file__).parents[2] / "project"
CATALOGUE = Catalogue.load([PROJECT])


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


def provisioned(cluster: Endpoints, **changed: str) -> subprocess.CompletedProcess[str]:
    """Run the module as the one-shot of a deployment does."""
    environment = {
        **os.environ,
        **cluster.environment(),
        "CAUSEMESH_PROJECT": str(PROJECT),
        **changed,
    }
    command = [sys.executable, "-m", "causemesh.provision"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_the_module_provisions_what_the_environment_names(cluster: Endpoints) -> None:
    for _ in range(2):
        ended = provisioned(cluster)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        said = json.loads(ended.stdout.splitlines()[-1])
        assert said["event"] == "provisioned"
        assert said["subjects"] == len(CATALOGUE.topics) + len(CATALOGUE.controls)
    assert said["topics_created"] == 0


def test_the_module_ends_with_the_reason(cluster: Endpoints) -> None:
    ended = provisioned(cluster, CAUSEMESH_PROJECT="/nowhere")
    assert ended.returncode == 1
    assert json.loads(ended.stdout.splitlines()[-1])["event"] == "provisioning_failed"


async def test_waiting_for_servers_ends(registry_url: str) -> None:
    settings = ServiceSettings(kafka_bootstrap="127.0.0.1:1", registry_url=registry_url)
    with pytest.raises(Retryable):
        await patiently(lambda: provision(settings), attempts=2)
