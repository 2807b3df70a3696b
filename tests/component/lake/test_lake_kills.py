"""The lake's writer killed at every step, and paused until it was replaced; on real servers."""

from __future__ import annotations

import asyncio
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
import pytest

from causemesh.faultpoints import Point
from causemesh.lake.definitions import table_name
from causemesh.lake.reading import Lake
from tests.children import child
from tests.component.lake.conftest import COUNT, produce
from tests.component.lake.lake_writer import PARTITIONS, Plan

pytestmark = pytest.mark.servers
POINTS = [
    *[Point.WORKER_CLAIMED, Point.WORKER_COMMITTED],  # "committed" only means that it waits
    *[Point.LAKE_CLAIMED, Point.LAKE_WRITING, Point.LAKE_WRITTEN, Point.LAKE_COMMITTED],
]
ALL = sorted(f"r{n}" for n in range(COUNT))
TABLES = ("decoded", "curated")


process = partial(child, "tests.component.lake.lake_writer")


def found(lake: Lake, plan: Plan) -> dict[str, list[str]]:
    """The event of each row of each table, repeats included; [] for a table not yet there."""
    there = {definition.identifier for definition, _ in lake.tables()}
    ids = {}
    for zone in TABLES:
        name = f"{zone}.{table_name(plan.facts)}"
        rows = lake.select(name, columns=["event_id"]).lazy().collect() if name in there else None
        ids[zone] = [] if rows is None else sorted(f"r{one[1:]}" for one in rows["event_id"])
    return ids


def epoch(lake: Lake, plan: Plan) -> int:
    """The least epoch of the partitions: above it once a later process has claimed them all."""
    name = f"decoded.{table_name(plan.facts)}"
    if name not in {definition.identifier for definition, _ in lake.tables()}:
        return 0
    progress = lake.progress(name)
    return min(progress.of(number).epoch for number in range(PARTITIONS))


def read_to_the_end(lake: Lake, plan: Plan, count: int) -> bool:
    """Whether both tables say that they hold the whole topic."""
    names = [f"{zone}.{table_name(plan.facts)}" for zone in TABLES]
    return all(
        lake.progress(name).of(number).position >= count // PARTITIONS - 1
        for name in names
        for number in range(PARTITIONS)
    )


async def everything(
    plan: Plan, wanted: list[str] = ALL, after_epoch: int = 0
) -> dict[str, list[str]]:
    """What the tables hold once a process that claimed after `after_epoch` has read the topic to
    its end and every record came through, and then nothing new for a while."""
    last: dict[str, list[str]] = {}
    with plan.lake() as lake:
        async with asyncio.timeout(90):
            while True:
                now = await asyncio.to_thread(found, lake, plan)
                if (
                    now == last
                    and all(set(ids) == set(wanted) for ids in now.values())
                    and epoch(lake, plan) > after_epoch
                    and read_to_the_end(lake, plan, len(wanted))
                ):
                    return now
                last = now
                await asyncio.sleep(0.7)


async def killed_at(point: Point, plan: Plan, log: Path) -> dict[str, list[str]]:
    """Kill at a passing of a point, start again unarmed; what the tables hold then."""
    count = 1 if point is Point.LAKE_CLAIMED else 2
    async with process(plan, log, f"{point}:kill:{count}") as child, asyncio.timeout(90):
        assert await child.wait() == -signal.SIGKILL, f"see {log}"
    with plan.lake() as lake:
        before = epoch(lake, plan)
    async with process(plan, log):
        return await everything(plan, after_epoch=before)


@pytest.mark.parametrize("point", POINTS)
async def test_a_kill_at_any_step_loses_and_doubles_nothing(
    point: Point, plan: Plan, tmp_path: Path
) -> None:
    assert await killed_at(point, plan, tmp_path / "log") == dict.fromkeys(TABLES, ALL)


async def replaced_while_paused(plan: Plan, tmp_path: Path) -> tuple[dict[str, list[str]], str]:
    """A writer stops between its files and their commit, another takes over and writes all, then
    the first goes on; what the tables hold then, and its log."""
    log = tmp_path / "paused.log"
    async with process(plan, log, f"{Point.LAKE_WRITTEN}:pause:2") as paused:
        state = psutil.Process(paused.pid)
        async with asyncio.timeout(60):
            while state.status() != psutil.STATUS_STOPPED:  # noqa: ASYNC110 - polls a process
                await asyncio.sleep(0.05)
        with plan.lake() as lake:
            before = epoch(lake, plan)
        async with process(plan, tmp_path / "next.log"):
            await everything(plan, after_epoch=before)
            paused.send_signal(signal.SIGCONT)
            await asyncio.sleep(4.0)  # for what the first still has to do
            return await everything(plan), log.read_text()


async def test_a_replaced_writer_that_goes_on_commits_nothing(plan: Plan, tmp_path: Path) -> None:
    ids, log = await replaced_while_paused(plan, tmp_path)
    assert "lake_refused" in log
    assert ids == dict.fromkeys(TABLES, ALL)


async def test_control_without_the_fence_the_same_pause_doubles(plan: Plan, tmp_path: Path) -> None:
    ids, log = await replaced_while_paused(replace(plan, arm="blind"), tmp_path)
    assert "lake_refused" not in log
    assert sum(map(len, ids.values())) > len(TABLES) * COUNT


async def test_two_writers_share_the_topic_and_a_newer_schema_comes(
    plan: Plan, tmp_path: Path
) -> None:
    """Each commits its partition to the same tables; the registry knows the new field."""
    topic = plan.catalogue().topic(plan.facts)
    more = {"name": "explanation", "type": ["null", "string"], "default": None}
    newer = replace(topic, record={**topic.record, "fields": [*topic.record["fields"], more]})
    log = tmp_path / "log"
    async with process(plan, log), process(plan, log):
        await everything(plan)
        await produce(plan, newer, COUNT, explanation="because")
        both = sorted(f"r{n}" for n in range(2 * COUNT))
        ids = await everything(plan, both)
    assert ids == dict.fromkeys(TABLES, both)
    name = f"decoded.{table_name(plan.facts)}"
    with plan.lake() as lake:
        rows = lake.select(name).lazy().collect()
        progress = lake.progress(name)
    assert rows["explanation"].null_count() == COUNT
    assert set(rows["explanation"].drop_nulls()) == {"because"}
    assert sorted(progress.partitions) == [0, 1]
