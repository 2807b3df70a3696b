"""A topic on real Kafka with records in it, and a lake on real Postgres and local files."""

from __future__ import annotations

import uuid
from pathlib import Path

import polars as pl
import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from causemesh.bus.base import Outbound
from causemesh.bus.kafka import KafkaBus
from causemesh.catalogue import Topic
from causemesh.codec.encode import RegistryEncoders
from causemesh.codec.registry import HttpRegistry
from tests.component.lake.lake_writer import PARTITIONS, Plan

COUNT = 160


@pytest.fixture
async def plan(
    kafka_bootstrap: str, registry_url: str, database: AsyncEngine, tmp_path: Path
) -> Plan:
    """A plan whose topic holds COUNT records."""
    url = database.url.set(drivername="postgresql+pg8000").render_as_string(hide_password=False)
    made = Plan(
        kafka_bootstrap, registry_url, url, f"file://{tmp_path}/tables", uuid.uuid4().hex[:12]
    )
    bus = KafkaBus(kafka_bootstrap)
    admin = bus.admin()
    await admin.ensure([made.catalogue().topic(made.facts)])
    await admin.close()
    await bus.close()
    await produce(made, made.catalogue().topic(made.facts), 0)
    return made


async def produce(plan: Plan, topic: Topic, first: int, **more: str) -> None:
    """COUNT predictions r<first>.. in turn on each partition."""
    bus, registry = KafkaBus(plan.kafka), HttpRegistry(plan.registry)
    encoder = await RegistryEncoders(registry).encoder(topic.subject, topic.record)
    numbers = range(first, first + COUNT)
    at = pl.Series([1_356_998_400_000_000 + n * 3_600_000_000 for n in numbers])
    frame = pl.DataFrame(
        {
            "event_id": [f"p{n}" for n in numbers],
            "tenant_id": [f"t{n % 2}" for n in numbers],
            "occurred_at": at.cast(pl.Datetime("us", "UTC")),
            "cause": [
                {"topic": "tasks", "partition": n % PARTITIONS, "position": n, "index": 0,
                 "origin": None}
                for n in numbers
            ],
            "request_id": [f"r{n}" for n in numbers],
            "model": ["m"] * COUNT,
            "version": pl.Series([1] * COUNT, dtype=pl.Int32),
            "outcome": ["predicted"] * COUNT,
            "score": [n / 1000 for n in numbers],
            "reason": pl.Series([None] * COUNT, dtype=pl.String),
            "vector": [b"\x00\x00\x80?"] * COUNT,
            "lane": ["realtime"] * COUNT,
            "compute_ms": [0.5] * COUNT,
            "predicted_at": at.cast(pl.Datetime("us", "UTC")),
        }
    ).with_columns(**{name: pl.lit(value) for name, value in more.items()})  # fmt: skip
    values = encoder.encode(frame)
    producer = bus.producer("outside")
    await producer.send(
        [Outbound(topic.name, n % PARTITIONS, [b"k"], [value]) for n, value in enumerate(values)]
    )
    await producer.close()
    await registry.close()
    await bus.close()
