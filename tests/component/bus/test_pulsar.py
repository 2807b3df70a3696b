"""What Pulsar's driver must take care of that no other broker asks for."""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import replace

import pytest

from causemesh.bus.base import BEFORE_FIRST, Outbound
from causemesh.bus.pulsar import PulsarBus, PulsarProducer
from causemesh.catalogue import Catalogue, Topic
from causemesh.local import Endpoints

pytestmark = pytest.mark.servers


async def test_a_member_that_dies_is_replaced_within_two_seconds(pulsar: Endpoints) -> None:
    """Its connection ends without a word, as at a kill -9: the client is shut down under it."""
    bus = PulsarBus(pulsar.pulsar_url, pulsar.pulsar_admin_url)
    other = PulsarBus(pulsar.pulsar_url, pulsar.pulsar_admin_url)
    admin = bus.admin()
    topic = f"pulsar.{uuid.uuid4().hex}"
    assert await admin.create(topic, 2)
    group = f"group-{uuid.uuid4().hex}"
    first, second = bus.membership(group, [topic]), other.membership(group, [topic])
    owned: dict[str, frozenset[int]] = {"first": frozenset(), "second": frozenset()}
    async with asyncio.timeout(20):
        while sorted(map(len, owned.values())) != [1, 1]:
            for name, member in (("first", first), ("second", second)):
                try:
                    owned[name] = await asyncio.wait_for(member.changed(), 1.0)
                except TimeoutError:
                    continue
    other.client().shutdown()
    async with asyncio.timeout(2.0):
        assert await first.changed() == frozenset({0, 1})
    for one in (first, second, admin, bus):
        await one.close()


@pytest.mark.parametrize("together", [1, 6])
async def test_stored_positions_are_gone_on_from_in_and_between_batches(
    pulsar: Endpoints, together: int
) -> None:
    bus = PulsarBus(pulsar.pulsar_url, pulsar.pulsar_admin_url)
    admin = bus.admin()
    topic = f"pulsar.{uuid.uuid4().hex}"
    await admin.create(topic, 1)
    producer: PulsarProducer = bus.producer("t")
    values = [b"%d" % number for number in range(6)]
    for begin in range(0, 6, together):
        part = values[begin : begin + together]
        await producer.send([Outbound(topic, 0, [None] * len(part), part)])
    positions = {}
    after = BEFORE_FIRST
    for left in range(6, 0, -1):
        reader = bus.reader({(topic, 0): after})
        rest: list[bytes | None] = []
        async with asyncio.timeout(20):
            while len(rest) < left:
                for batch in await reader.fetch(100, 0.5):
                    positions |= dict(zip(batch.values, batch.positions.tolist(), strict=True))
                    rest += batch.values
        assert rest == values[-left:]
        after = positions[rest[0]]
        await reader.close()
    assert (await admin.ends([topic]))[(topic, 0)] == positions[values[-1]]
    assert len({at >> 12 for at in positions.values()}) == 6 // together
    for one in (producer, admin, bus):
        await one.close()


async def test_topics_are_kept_as_long_as_the_catalogue_says(pulsar: Endpoints) -> None:
    """Also when it changes; a topic of states, whose newest must stay, for ever."""
    bus = PulsarBus(pulsar.pulsar_url, pulsar.pulsar_admin_url)
    admin = bus.admin()
    core = Catalogue.load(partitions=1)
    name = uuid.uuid4().hex
    fact = replace(core.topic("ingest.rejects.v1"), name=f"fact.{name}", retention_days=35)
    state = replace(fact, name=f"state.{name}", form="state")

    async def kept(topic: Topic) -> int:
        answer = await admin.ask("GET", f"{topic.name}/retention")
        assert answer.json()["retentionSizeInMB"] == -1
        return int(answer.json()["retentionTimeInMinutes"])

    await admin.ensure([fact, state])
    assert [await kept(fact), await kept(state)] == [35 * 24 * 60, -1]
    await admin.ensure([replace(fact, retention_days=7), state])
    assert [await kept(fact), await kept(state)] == [7 * 24 * 60, -1]
    for one in (admin, bus):
        await one.close()
