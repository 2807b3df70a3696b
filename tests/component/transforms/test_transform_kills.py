"""A transform's process killed at every step, on real servers: nothing is lost, nothing doubles."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest

from causemesh.faultpoints import Point
from tests.component.transforms.conftest import World

pytestmark = [pytest.mark.servers, pytest.mark.timeout(420)]
WHO = [f"w{n}" for n in range(9)]
COUNT = 600
FAULTS = [
    f"{Point.WORKER_SENT}:kill:2",  # the feed's: what it sent comes again
    f"{Point.TRANSFORM_APPLIED}:kill:3",
    f"{Point.TRANSFORM_SENT}:kill:3",
    f"{Point.TRANSFORM_STORED}:kill:3",
]


def steps(rng: random.Random, count: int, *, poison: bool = True) -> list[tuple[str | None, int]]:
    """Amounts for someone, or for nobody; some that the function refuses."""
    bad = 0.02 if poison else 0.0
    return [
        (rng.choice([*WHO, None]), -1 if rng.random() < bad else rng.randrange(100))
        for _ in range(count)
    ]


async def killed(world: World, log: Path, fault: str, arm: str = "") -> None:
    """Run until the armed point kills the process."""
    async with world.process(log, fault, arm) as child, asyncio.timeout(90):
        assert await child.wait() == -signal.SIGKILL, f"see {log}"


async def right(world: World) -> int:
    """The log holds each output once for its readers, every table is as it must be; returns how
    many outputs were sent more than once."""
    said = await world.expected()
    written = await world.records(world.transform.output)
    found = {
        row["event_id"]: (row["who"], row["n"], row["total"], row["chain"]) for _, _, row in written
    }
    assert len(written) == len(found)
    assert found == said.outputs
    # what was sent again is what was sent
    again = await world.raw(world.transform.output)
    assert {
        (row["event_id"], row["who"], row["n"], row["total"], row["chain"]) for *_, row in again
    } == {(key, *value) for key, value in said.outputs.items()}
    assert await world.tables() == said.tables
    assert set(await world.dead()) == said.failed
    return len(again) - len(written)


async def test_kills_at_every_step_and_at_any_time(world: World, tmp_path: Path) -> None:
    rng, log = random.Random(7), tmp_path / "log"
    for fault in FAULTS:
        await world.produce(steps(rng, COUNT), repeat=5)
        await killed(world, log, fault)
    for _ in range(3):
        await world.produce(steps(rng, COUNT), repeat=5)
        async with world.process(log) as child:
            await world.ready(child)
            await world.produce(steps(rng, COUNT))
            await asyncio.sleep(rng.uniform(0.0, 1.5))
    async with world.process(log) as child:
        await world.settled()
        assert await right(world) > 0, "nothing had to be sent again"
        said = await world.expected()
        assert len(said.outputs) > 3_000
        assert said.failed
        # what it knows is what is stored: the next event goes on from there
        await world.produce([(who, 1) for who in WHO])
        await world.settled()
        await right(world)
        child.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(child.wait(), 30) == 0, log.read_text()[-3000:]


@pytest.mark.parametrize("arm", ["marks", "positions"])
async def test_control_without_a_protection_the_same_kills_show(
    arm: str, world: World, tmp_path: Path
) -> None:
    rng, log = random.Random(8), tmp_path / "log"
    for fault in FAULTS:
        await world.produce(steps(rng, COUNT, poison=False), repeat=5)
        await killed(world, log, fault, arm)
    async with world.process(log, arm=arm):
        await asyncio.sleep(25)  # "settled" may never come
    with pytest.raises(AssertionError):
        await right(world)


async def older_rows(world: World) -> int:
    """How many stored rows are behind a newer one of their key."""
    newest: dict[bytes | None, int] = {}
    older = 0
    for _, key, row in await world.raw(world.transform.state):
        older += row["sequence"] < newest.get(key, -1)
        newest[key] = max(row["sequence"], newest.get(key, -1))
    return older


@asynccontextmanager
async def replaced_while_paused(world: World, tmp_path: Path, arm: str = "") -> AsyncIterator[Path]:
    """A process stops between what it sent and its tables, another takes over and does all, the
    first goes on, and writes this log."""
    rng, log = random.Random(9), tmp_path / "paused.log"
    await world.produce(steps(rng, COUNT))
    async with world.process(log, f"{Point.TRANSFORM_SENT}:pause:3", arm) as paused:
        state = psutil.Process(paused.pid)
        async with asyncio.timeout(60):
            while state.status() != psutil.STATUS_STOPPED:  # noqa: ASYNC110 - polls a process
                await asyncio.sleep(0.05)
        async with world.process(tmp_path / "next.log") as second:
            await world.ready(second)
            await world.produce(steps(rng, COUNT))
            await world.settled()
            paused.send_signal(signal.SIGCONT)
            yield log


async def test_a_replaced_process_that_goes_on_stores_nothing(world: World, tmp_path: Path) -> None:
    async with replaced_while_paused(world, tmp_path) as log:
        async with asyncio.timeout(60):
            while "transform_replaced" not in log.read_text():  # noqa: ASYNC110 - polls a file
                await asyncio.sleep(0.1)
        await world.produce(steps(random.Random(10), COUNT))
        await world.settled()
        await right(world)
    assert await older_rows(world) == 0


async def test_control_without_the_fence_it_stores_what_is_over(
    world: World, tmp_path: Path
) -> None:
    async with replaced_while_paused(world, tmp_path, arm="fence") as log, asyncio.timeout(60):
        while not await older_rows(world):  # noqa: ASYNC110 - polls a topic
            await asyncio.sleep(0.2)
    assert "transform_replaced" not in log.read_text()
