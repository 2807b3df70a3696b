"""The runner with a group and workers of the test's own."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, cast

import pytest

from causemesh.bus.base import TopicPartition
from causemesh.errors import Fatal, Fenced, MeshError, Retryable
from causemesh.runner.runner import Runner
from causemesh.runner.worker import PartitionWorker


class Group:
    """Assigns what the test puts in; `before` is called in the moment in which it does."""

    def __init__(self, *assignments: frozenset[int], before: Callable[[], None]) -> None:
        self._assignments: asyncio.Queue[frozenset[int]] = asyncio.Queue()
        for partitions in assignments:
            self._assignments.put_nowait(partitions)
        self._before = before
        self.left = False

    async def changed(self) -> frozenset[int]:
        partitions = await self._assignments.get()
        self._before()
        return partitions

    def assign(self, partitions: frozenset[int]) -> None:
        self._assignments.put_nowait(partitions)

    async def report(self, positions: Mapping[TopicPartition, int]) -> None:
        """Nobody reads it."""

    async def close(self) -> None:
        self.left = True


class Worker:
    """Fails in the ways it was told to, then works until it is to stop."""

    stage = type("Stage", (), {"group": "g", "shared": ()})()

    def __init__(self, failures: list[Exception]) -> None:
        self._failures = failures
        self.stopping = False
        self.committed = False
        self.positions: dict[Any, int] = {}
        self.claimed = False

    async def run(self) -> None:
        self.claimed = True
        if self._failures:
            raise self._failures.pop()
        await until(lambda: self.stopping)


class Time:
    """Passes as fast as it is slept through; `waited` is told before each sleep.

    Only short sleeps end: the runner looks often while it waits, and its reports are far between.
    """

    def __init__(self, waited: Callable[[], None] = lambda: None) -> None:
        self.passed = 0.0
        self._waited = waited

    def now_us(self) -> int:
        return int(self.passed * 1e6)

    def monotonic(self) -> float:
        return self.passed

    async def sleep(self, seconds: float) -> None:
        if seconds > 1.0:
            await asyncio.get_running_loop().create_future()
        self._waited()
        await asyncio.sleep(0)
        self.passed += seconds


class Crew:
    """A runner's workers, in the order in which it made them."""

    def __init__(self, *failures: Exception) -> None:
        self.made: list[Worker] = []
        self._failures = list(failures)

    def __call__(self, partition: int) -> PartitionWorker:
        self.made.append(Worker(self._failures))
        return cast(PartitionWorker, self.made[-1])


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not holds():  # noqa: ASYNC110 - what holds is told by no event
            await asyncio.sleep(0)


async def finished(run: Awaitable[None]) -> None:
    async with asyncio.timeout(10):
        await run


async def test_a_runner_stopped_as_it_gets_partitions_starts_no_worker_and_leaves() -> None:
    """A claim at that moment would fence the partition's next owner."""
    crew = Crew()
    group = Group(frozenset({0, 2}), before=lambda: runner.stop())  # noqa: PLW0108 - made below
    runner = Runner(group, crew, Time())
    await finished(runner.run())
    assert [worker.stopping for worker in crew.made] == [True, True]
    assert not any(worker.claimed for worker in crew.made)
    assert group.left
    assert not runner.workers


@pytest.mark.parametrize("error", [Fenced("replaced"), Retryable("away"), Fatal("broken")])
async def test_a_worker_that_ended_is_started_again_while_its_partition_is_ours(
    error: MeshError,
) -> None:
    """Even a fenced one: its partition may have been claimed by a process that had lost it."""
    crew = Crew(error)
    clock = Time()
    runner = Runner(Group(frozenset({1}), before=lambda: None), crew, clock)
    running = asyncio.create_task(runner.run())
    await until(lambda: len(crew.made) == 2 and crew.made[1].claimed)
    runner.stop()
    await finished(running)
    assert len(crew.made) == 2


@pytest.mark.parametrize(
    "error", [Fenced("replaced"), Retryable("away", retry_after=3600.0), Fatal("broken")]
)
async def test_a_worker_that_waits_to_start_again_gives_its_partition_up_at_once(
    error: MeshError,
) -> None:
    crew = Crew(error)
    clock = Time(lambda: group.assign(frozenset()) if crew.made and crew.made[0].claimed else None)
    group = Group(frozenset({1}), before=lambda: None)
    runner = Runner(group, crew, clock)
    running = asyncio.create_task(runner.run())
    await until(lambda: bool(crew.made) and crew.made[0].stopping and not runner.workers)
    assert len(crew.made) == 1
    assert clock.passed < 2.0
    runner.stop()
    await finished(running)
