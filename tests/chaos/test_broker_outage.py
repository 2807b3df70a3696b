"""A broker that is away for longer than a producer waits for its answers."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from causemesh.bus.base import BEFORE_FIRST, Outbound, Producer
from causemesh.bus.kafka import KafkaBus
from causemesh.catalogue import Catalogue
from causemesh.errors import Retryable
from causemesh.local import Cluster

pytestmark = [pytest.mark.servers, pytest.mark.timeout(180)]
AWAY_S = 17.0  # above the producer's request time-out
BEFORE, DURING, AFTER = [b"a", b"b"], [b"c", b"d", b"e"], [b"f"]


async def until_sent(producer: Producer, topic: str, values: Sequence[bytes]) -> None:
    """Send as a worker does: again after Retryable."""
    async with asyncio.timeout(60):
        while True:
            try:
                await producer.send([Outbound(topic, 0, [None] * len(values), list(values))])
            except Retryable as error:
                print(f"  {error}")
                await asyncio.sleep(error.retry_after)
            else:
                return


async def log_of(bus: KafkaBus, topic: str) -> list[bytes | None]:
    """Every value, in order."""
    reader = bus.reader({(topic, 0): BEFORE_FIRST})
    found: list[bytes | None] = []
    while raws := await reader.fetch(1_000, 2.0):
        found += [value for raw in raws for value in raw.values]
    await reader.close()
    return found


async def test_a_long_outage_leaves_no_gap_and_no_producer_stuck(kafka_bootstrap: str) -> None:
    """What was being sent when the broker died is written in its order, repeats aside, and so is
    what follows."""
    kafka = Cluster(Path(os.environ.get("CAUSEMESH_TEST_HOME", ".causemesh-test")), ["kafka"])
    bus = KafkaBus(kafka_bootstrap)
    admin, producer = bus.admin(), bus.producer("outage")
    topic = f"inbox.t{uuid.uuid4().hex}"
    await admin.ensure([replace(Catalogue.load(partitions=1).topic("inbox.requests"), name=topic)])
    await until_sent(producer, topic, BEFORE)
    kafka.kill("kafka")
    try:
        during = asyncio.create_task(until_sent(producer, topic, DURING))
        await asyncio.sleep(AWAY_S)
    finally:
        await asyncio.to_thread(kafka.up)
    await during
    await until_sent(producer, topic, AFTER)
    found = await log_of(bus, topic)
    assert list(dict.fromkeys(found)) == [*BEFORE, *DURING, *AFTER]
    for one in (producer, admin, bus):
        await one.close()
