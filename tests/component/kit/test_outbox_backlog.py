"""An outbox tells how much waits and for how long, also when its drain is stuck."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine

from causemesh.catalogue import Catalogue
from causemesh.codec.encode import RegistryEncoders
from causemesh.codec.registry import MemoryRegistry
from causemesh.errors import Retryable
from causemesh.outbox import Event, OutboxDrain, add_events
from causemesh.outbox_backlog import Backlog, backlog
from causemesh.runner import Emitter

pytestmark = pytest.mark.servers
TOPIC = "training.requests.v1"


class Producer:
    """Takes everything, or nothing while it is stuck."""

    stuck = False

    async def send(self, outbound: Any) -> None:
        if self.stuck:
            raise Retryable("the broker is away")


def drain_of(engine: AsyncEngine, producer: Any) -> OutboxDrain:
    catalogue = Catalogue.load()
    emitter = Emitter(catalogue, RegistryEncoders(MemoryRegistry()), producer, [TOPIC])
    return OutboxDrain("drift", engine, catalogue, emitter)


async def add(engine: AsyncEngine, count: int, shard: int = 0) -> None:
    record = {"tenant_id": "t", "occurred_at": 0, "model": "m", "version": 1, "reason": ""}
    async with engine.begin() as transaction:
        await add_events(transaction, [Event(TOPIC, "k", record)] * count, shard=shard)


async def age(engine: AsyncEngine, shard: int, seconds: int) -> None:
    async with engine.begin() as transaction:
        statement = "UPDATE outbox_rows SET added_at = now() - make_interval(secs => :s)"
        where = " WHERE shard = :shard"
        await transaction.execute(sa.text(statement + where), {"s": seconds, "shard": shard})


async def test_depth_and_age_are_those_of_what_was_not_sent(database: AsyncEngine) -> None:
    assert await backlog(database) == Backlog(0, 0.0)
    producer = Producer()
    drain = drain_of(database, producer)
    producer.stuck = True
    await add(database, 3)
    await add(database, 4, shard=7)
    await age(database, 7, 100)
    with pytest.raises(Retryable, match="away"):
        await drain.drain()
    waiting = await backlog(database)
    assert waiting.rows == 7
    assert 100 <= waiting.oldest_s < 130
    producer.stuck = False
    assert await drain.drain() == 7
    assert await backlog(database) == Backlog(0, 0.0)
    # New rows of a shard that was drained before: only they count, and they are young.
    await add(database, 2, shard=7)
    waiting = await backlog(database)
    assert waiting.rows == 2
    assert waiting.oldest_s < 30
