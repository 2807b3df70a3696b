"""The Kafka producer after a batch that it had to give up."""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import replace

import pytest

from causemesh.bus import kafka_producer
from causemesh.bus.base import BEFORE_FIRST, Outbound
from causemesh.bus.kafka import KafkaBus
from causemesh.bus.kafka_producer import KafkaProducer
from causemesh.catalogue import Catalogue
from causemesh.errors import Retryable

pytestmark = pytest.mark.servers


@pytest.mark.parametrize("new_session", [True, False])
async def test_a_batch_given_up_does_not_block_those_after_it(
    kafka_bootstrap: str, monkeypatch: pytest.MonkeyPatch, new_session: bool
) -> None:
    """A batch that waits too long for a partition without leader fails, though the broker never saw
    the sequence numbers it was given. The control arm goes on in the same session."""
    if not new_session:
        monkeypatch.setattr(KafkaProducer, "_give_up", lambda self, session: None)
    monkeypatch.setattr(kafka_producer, "_REQUEST_TIMEOUT_MS", 500)
    name = f"inbox.t{uuid.uuid4().hex}"
    core = Catalogue.load(partitions=1).topic("inbox.requests")
    bus = KafkaBus(kafka_bootstrap)
    admin, producer = bus.admin(), bus.producer("giving-up")
    await admin.ensure([replace(core, name=name)])

    async def send(*values: bytes) -> None:
        await producer.send([Outbound(name, 0, [None] * len(values), list(values))])

    await send(b"a", b"b")
    cluster = producer._session._producer.client.cluster
    with monkeypatch.context() as patched:
        patched.setattr(cluster, "leader_for_partition", lambda _: -1)
        with pytest.raises(Retryable):
            await send(b"c", b"d")
    async with asyncio.timeout(20):
        if new_session:
            await send(b"c", b"d")
            await send(b"e")
        else:
            for _ in range(2):
                with pytest.raises(Retryable, match="OutOfOrderSequence"):
                    await send(b"c", b"d")
    reader = bus.reader({(name, 0): BEFORE_FIRST})
    found: list[bytes | None] = []
    while raws := await reader.fetch(100, 2.0):
        found += [value for raw in raws for value in raw.values]
    assert found == ([b"a", b"b", b"c", b"d", b"e"] if new_session else [b"a", b"b"])
    for one in (reader, producer, admin, bus):
        await one.close()
