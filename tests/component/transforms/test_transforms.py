"""A transform's process on real servers: what its output is to the rest of the mesh."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import httpx
import pytest
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

from causemesh.bus.base import Outbound
from causemesh.catalogue import TRANSFORMS, WATERMARK
from causemesh.codec.decode import Decoder
from causemesh.local import Endpoints
from causemesh.local.mesh import Mesh
from causemesh.local.ports import choose_ports
from causemesh.settings import API_PORTS
from services.features.transforms.worker import GROUP
from tests.component.transforms.conftest import PARTITIONS, World
from tests.component.transforms.test_transform_kills import right

pytestmark = [pytest.mark.servers, pytest.mark.timeout(240)]
AT_US = 1_356_998_400_000_000


async def promises(world: World, topic: str) -> dict[tuple[str, int], int]:
    """The highest watermark of each source on every partition of a topic: the least of those."""
    schema = world.catalogue.controls[WATERMARK]
    ends = await world.reader.ends([topic])
    left = {source: span.last for source, span in ends.items() if span.last >= 0}
    reader = world.bus.reader(dict.fromkeys(ends, -1))
    heard: dict[tuple[int, str, int], int] = {}
    while left:
        for raw in await reader.fetch(20_000, 0.5):
            decoded = await Decoder(world.registry).decode(raw.values, schema)
            for row in decoded.frame.to_dicts():
                key = (raw.partition, row["source_topic"], row["source_partition"])
                at_us = round(row["watermark_at"].timestamp() * 1e6)
                heard[key] = max(at_us, heard.get(key, 0))
            source = (raw.topic, raw.partition)
            if source in left and int(raw.positions[-1]) >= left[source]:
                del left[source]
    await reader.close()
    sources = {(name, number) for _, name, number in heard}
    return {
        (name, number): min(heard.get((n, name, number), 0) for n in range(PARTITIONS))
        for name, number in sources
    }


async def promised(world: World, at_us: int) -> None:
    """Wait until the output says that nothing before `at_us` will follow."""
    wanted = {(world.transform.feed, number): at_us for number in range(PARTITIONS)}
    async with asyncio.timeout(60):
        while await promises(world, world.transform.output) != wanted:  # noqa: ASYNC110
            await asyncio.sleep(0.3)


async def test_event_time_goes_on_through_a_transform(world: World, tmp_path: Path) -> None:
    """Also past a kill after which only some sources say something new."""
    log = tmp_path / "log"
    async with world.process(log) as child:
        await world.ready(child)
        await world.produce([("a", 1), ("b", 2)])
        await world.promise(AT_US)
        await promised(world, AT_US)
        async with httpx.AsyncClient(verify=False) as client:
            told = (await client.get(f"http://127.0.0.1:{world.port}/metrics")).text
        assert (
            f'causemesh_outcomes_total{{kind="transform_outputs",outcome="{world.out}"}} 2' in told
        )
    async with world.process(log) as child:
        await world.ready(child)
        await world.promise(AT_US + 1_000_000)
        await promised(world, AT_US + 1_000_000)


async def test_a_second_process_takes_its_share_and_gives_it_back(
    world: World, tmp_path: Path
) -> None:
    """Tables move with their partitions, in both directions, and nothing is lost on the way."""
    log = tmp_path / "log"
    who = [f"w{n}" for n in range(8)]
    async with world.process(log) as first:
        await world.ready(first)
        await world.produce([(name, 1) for name in who] * 20)
        async with world.process(tmp_path / "second") as second:
            await world.ready(second)
            for _ in range(10):
                await world.produce([(name, 2) for name in who] * 5)
                await asyncio.sleep(0.2)
            await world.settled()
            await right(world)
            await world.produce([(name, 3) for name in who] * 20)
        await world.produce([(name, 4) for name in who] * 20)
        await world.settled()
        await right(world)


async def test_the_mesh_runs_it_and_faust_makes_no_topic(
    world: World, cluster: Endpoints, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    # a mesh of its own, on the servers of the session
    shutil.copy(Path(cluster.triton_models).parents[1] / "ports.json", home)
    choose_ports(home / "service-ports.json", dict.fromkeys(API_PORTS, 0))
    mesh = Mesh(home, cluster, world.folder, [TRANSFORMS])
    try:
        await asyncio.to_thread(mesh.up)
        await world.produce([("a", 1), ("b", 2), (None, 3), ("a", 4)])
        await world.settled()
        mesh.kill(TRANSFORMS)  # its supervisor starts it again
        await world.produce([("a", 5)])
        await world.settled()
        await right(world)
        assert (await world.tables())["a"]["total"] == 10
    finally:
        await asyncio.to_thread(mesh.down)
    admin = AIOKafkaAdminClient(bootstrap_servers=cluster.kafka_bootstrap)
    await admin.start()
    topics = await admin.list_topics()
    settings = await admin.describe_configs(
        [ConfigResource(ConfigResourceType.TOPIC, world.transform.state)]
    )
    await admin.close()
    assert [name for name in topics if GROUP in name or "assignor" in name] == []
    assert "'cleanup.policy', config_value='compact'" in str(settings)


async def test_a_row_that_it_can_not_read_ends_it(world: World, tmp_path: Path) -> None:
    """Faust alone would log it, and go on with tables that lack the row."""
    log = tmp_path / "log"
    await world.producer.send(
        [Outbound(world.transform.state, 0, [b"sa"], [b"\0\xff\xff\xff\xff"])]
    )
    async with world.process(log) as child, asyncio.timeout(60):
        assert await child.wait() == 1
    assert "a row of the changelog is not of schema" in log.read_text()
