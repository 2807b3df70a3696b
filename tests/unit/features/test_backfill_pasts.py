"""Pasts from a lake on local files and a log in memory: what the one lacks comes from the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from causemesh.bus.base import BEFORE_FIRST
from causemesh.bus.memory import MemoryBus, MemoryReader
from causemesh.catalogue import DEADLETTERS, WATERMARK, Catalogue
from causemesh.codec.decode import Decoder
from causemesh.codec.registry import MemoryRegistry
from causemesh.errors import Gone
from causemesh.lake.definitions import LakeDefinition, define_lake
from causemesh.lake.upkeep import retain
from causemesh.runner import Stage
from services.features.backfill.filling import Made, Order, TopicPass
from services.features.backfill.lake_past import LakePast, past_in
from services.features.backfill.log_past import LogPast
from services.features.backfill.pasts import Pasts
from services.features.domain.parsing import parse_views
from services.features.lake.store import FlushLimits, LakeStore
from services.features.lake.wiring import groups_of
from services.features.plan import REQUESTS, as_decoded, event_frame
from tests.unit.lake.mesh import DAY_US, PARTITIONS, START_US, LakeMesh, instants, lake_settings

PROJECT = Path(__file__).parents[3] / "tests" / "project"
EVENTS = "events.reading"
SITES = ["n", "s", "e", "w"]
FEATURES = {"*": ["count 4d", "age"], "value": ["latest", "sum 4d", "distinct 4d"]}
BODY = {"event": "reading", "entity": "site", "scope": "shared", "tile": "1h"}
(SHARED, MOVED) = parse_views(
    {
        "views": {
            "shared": {**BODY, "placement": "broadcast", "features": FEATURES},
            "moved": {**BODY, "placement": "rekeyed", "features": FEATURES},
        }
    }
)
(WINDOWED,) = parse_views(
    {"views": {"w": {**BODY, "placement": "broadcast", "features": {"*": ["count 1d"]}}}}
)
VIEWS = [SHARED, MOVED, WINDOWED]


class Readings(LakeMesh):
    """events.reading in memory, and its table."""

    def __init__(self, folder: Path, retention_days: int = 730) -> None:
        core = Catalogue.load([PROJECT], partitions=PARTITIONS)
        events = replace(core.topic(EVENTS), sources=(), lake_retention_days=retention_days)
        dead = replace(core.topic(DEADLETTERS), lake=False)
        requests = replace(core.topic(REQUESTS), lake=False)
        self.catalogue = Catalogue(
            {EVENTS: events, DEADLETTERS: dead, REQUESTS: requests},
            {},
            {WATERMARK: core.controls[WATERMARK]},
        )
        self.definition = LakeDefinition(define_lake(self.catalogue, None).tables)
        self.bus, self.registry = MemoryBus(), MemoryRegistry()
        for topic in self.catalogue.topics.values():
            self.bus.create(topic.name, topic.partitions)
        self.settings = lake_settings(folder)
        self._store = LakeStore
        self.max_records = 7
        self.limits = FlushLimits(seconds=1e6, position_s=1e6)
        ((self.group, topics),) = groups_of(self.catalogue, self.definition).items()
        self.stage = Stage("lake", self.group, topics)
        self.opened = 0
        self.percent: list[int] = []

    async def read(self, numbers: Sequence[int], partition: int, at_us: int | None = None) -> None:
        """Readings with these numbers, which are their causes, too; six hours apart."""
        times = [START_US + n * DAY_US // 4 if at_us is None else at_us for n in numbers]
        frame = pl.DataFrame(
            {
                "event_id": [f"e{n}" for n in numbers],
                "tenant_id": [f"t{n % 2}" for n in numbers],
                "occurred_at": instants(times),
                "cause": [
                    {
                        "topic": "inbox.reading",
                        "partition": partition,
                        "position": n,
                        "index": 0,
                        "origin": None,
                    }
                    for n in numbers
                ],
                "sensor": ["x"] * len(numbers),
                "site": [SITES[n % 4] for n in numbers],
                "value": [float(n) for n in numbers],
            }
        )
        await self.append(self.catalogue.topic(EVENTS), frame, partition)

    def find(self, topic: str) -> LakePast | None:
        self.opened += 1
        with self.lake() as lake:
            return past_in(lake, self.catalogue.topic(topic))

    def log(self) -> LogPast:
        return LogPast(self.bus, self.catalogue, Decoder(self.registry))

    async def orders(self, until_us: int) -> list[Order]:
        ends = await self.log().ends([EVENTS])
        cuts = {partition: at for (_, partition), at in ends.items()}
        moved = [Order(MOVED, k, cuts, until_us) for k in range(PARTITIONS)]
        return [Order(SHARED, 0, cuts, until_us), *moved, Order(WINDOWED, 0, cuts, until_us)]

    async def compute(self, until_us: int, *, lake: bool = True) -> list[Made]:
        history = Pasts(self.catalogue, self.log(), self.find if lake else None)
        return await history.compute(await self.orders(until_us), self.percent.append)


async def wanted(readings: Readings, until_us: int) -> list[Made]:
    """The same from the log alone, by the plain reader."""
    orders = await readings.orders(until_us)
    reading = TopicPass(orders, PARTITIONS)
    for partition, at in orders[0].cuts.items():
        async for batch in readings.log().batches(EVENTS, {partition: (-1, at)}, []):
            reading.take(event_frame(batch))
    return reading.made(dict.fromkeys(range(PARTITIONS)))


def told(pasts: Sequence[Made], until_us: int) -> list[Any]:
    """What each past says: answers of its state, and what is to come."""
    found = []
    for made in pasts:
        as_of = np.full(len(SITES), until_us)
        order = np.lexsort((made.ahead.position, made.ahead.source))
        ahead = made.ahead.take(order)
        found.append(
            (
                made.state.answer(SITES, as_of).tobytes(),
                ahead.entity.to_list(),
                ahead.occurred_at_us.tolist(),
                ahead.values.tolist(),
            )
        )
    return found


@pytest.fixture
async def readings(tmp_path: Path) -> Readings:
    made = Readings(tmp_path)
    await made.read(range(0, 40, 2), 0)
    await made.read(range(1, 40, 2), 1)
    return made


UNTIL_US = START_US + 9 * DAY_US  # before reading 36


async def test_all_of_it_from_the_lake(readings: Readings) -> None:
    await readings.write_all()
    pasts = await readings.compute(UNTIL_US)
    assert told(pasts, UNTIL_US) == told(await wanted(readings, UNTIL_US), UNTIL_US)
    assert pasts[0].events == 40
    assert sorted(pasts[0].ahead.position.tolist()) == [18, 18, 19, 19]
    assert pasts[-1].events == 8  # a day, and what is ahead
    assert [one.complete_from_us for one in pasts] == [None] * 4
    assert readings.percent == sorted(readings.percent)
    assert readings.percent[-1] == 100


async def test_without_a_lake_from_the_log(readings: Readings) -> None:
    pasts = await readings.compute(UNTIL_US, lake=False)
    assert told(pasts, UNTIL_US) == told(await wanted(readings, UNTIL_US), UNTIL_US)
    assert readings.opened == 0
    # a lake to which nothing was written is none
    again = await readings.compute(UNTIL_US)
    assert told(again, UNTIL_US) == told(pasts, UNTIL_US)


async def behind(readings: Readings) -> bool:
    """Whether it is right when the lake is behind and events were sent again across its end."""
    await readings.write_all()
    await readings.read(range(30, 50, 2), 0)  # 30 to 38 came before
    pasts = await readings.compute(UNTIL_US)
    return told(pasts, UNTIL_US) == told(await wanted(readings, UNTIL_US), UNTIL_US)


async def test_the_rest_from_the_log_each_once(readings: Readings) -> None:
    assert await behind(readings)


async def test_control_without_the_lake_s_marks_what_was_sent_twice_counts_twice(
    readings: Readings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LakePast, "marks", lambda *_: [])
    assert not await behind(readings)


async def retired(tmp_path: Path) -> tuple[list[Made], list[Made]]:
    """With days that the lake's retention took out, and the log still has; and a late event of
    such a day that the lake has again."""
    readings = Readings(tmp_path, retention_days=3)
    await readings.read(range(0, 40, 2), 0)
    await readings.read(range(1, 40, 2), 1)
    await readings.write_all()
    (table,) = [one for one in readings.definition.tables.values() if one.zone == "decoded"]
    with readings.lake() as lake:
        assert retain(lake.catalog, table) > 10
    await readings.read([41, 43], 1)
    await readings.read([45], 1, at_us=START_US + 1)
    await readings.write_all()
    return await readings.compute(UNTIL_US), await wanted(readings, UNTIL_US)


async def test_what_the_lake_s_retention_took_out_from_the_log(tmp_path: Path) -> None:
    pasts, want = await retired(tmp_path)
    assert told(pasts, UNTIL_US) == told(want, UNTIL_US)
    assert [one.events for one in pasts] == [one.events for one in want]


async def test_control_what_both_hold_of_it_would_count_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "services.features.backfill.pasts._Lake.holds",
        lambda _, source, positions: np.zeros(len(positions), np.bool_),
    )
    pasts, want = await retired(tmp_path)
    assert [one.events for one in pasts] != [one.events for one in want]


def test_a_field_that_was_added_later_has_its_default_as_in_the_log() -> None:
    topic = Catalogue.load([PROJECT]).topic(EVENTS)
    more = [
        {"name": "kind", "type": "string", "default": "plain"},
        {"name": "note", "type": ["null", "string"], "default": None},
        {"name": "grade", "type": "int", "default": 3},
    ]
    grown = replace(topic, record={**topic.record, "fields": [*topic.record["fields"], *more]})
    rows = pl.DataFrame(
        {"value": [1.0, 2.0], "kind": [None, "odd"]}, schema_overrides={"kind": pl.String}
    )
    made = as_decoded(grown, rows, {"value", "kind", "note", "grade"})
    assert pl.DataFrame(made).to_dict(as_series=False) == {
        "value": [1.0, 2.0],
        "kind": ["plain", "odd"],
        "note": [None, None],
        "grade": [3, 3],
    }


class Trimmed(MemoryBus):
    """A log whose beginning was deleted: `begins` says from where on it is there."""

    def __init__(self) -> None:
        super().__init__()
        self.begins: dict[tuple[str, int], int] = {}

    def reader(self, after: Mapping[tuple[str, int], int]) -> MemoryReader:
        for source, at in after.items():
            if BEFORE_FIRST < at < self.begins.get(source, 0) - 1:
                raise Gone(f"the log of {source} no longer holds {at}")
        return super().reader(
            {source: max(at, self.begins.get(source, 0) - 1) for source, at in after.items()}
        )


@pytest.fixture
async def trimmed(tmp_path: Path) -> Readings:
    made = Readings(tmp_path)
    made.bus = Trimmed()
    for topic in made.catalogue.topics.values():
        made.bus.create(topic.name, topic.partitions)
    await made.read(range(0, 40, 2), 0)
    await made.read(range(1, 40, 2), 1)
    return made


async def test_what_neither_holds_is_told(trimmed: Readings) -> None:
    assert isinstance(trimmed.bus, Trimmed)
    trimmed.bus.begins = {(EVENTS, 0): 6}  # of reading 12
    pasts = await trimmed.compute(UNTIL_US, lake=False)
    assert [one.events for one in pasts] == [34, *[one.events for one in pasts[1:3]], 8]
    since = START_US + 12 * DAY_US // 4
    assert [one.complete_from_us for one in pasts] == [since, since, since, None]


async def test_a_log_that_begins_behind_where_the_lake_ends(trimmed: Readings) -> None:
    assert isinstance(trimmed.bus, Trimmed)
    await trimmed.write_all()
    await trimmed.read(range(40, 52, 2), 0)  # at 20 to 25
    trimmed.bus.begins = {(EVENTS, 0): 23}  # of reading 46
    until_us = START_US + 12 * DAY_US
    pasts = await trimmed.compute(until_us)
    assert pasts[0].events == 43
    since = START_US + 46 * DAY_US // 4
    assert [one.complete_from_us for one in pasts] == [since] * 4


async def test_a_lake_is_enough_where_the_log_has_been_trimmed(trimmed: Readings) -> None:
    assert isinstance(trimmed.bus, Trimmed)
    await trimmed.write_all()
    trimmed.bus.begins = {(EVENTS, 0): 15, (EVENTS, 1): 15}
    pasts = await trimmed.compute(UNTIL_US)
    assert pasts[0].events == 40
    # the lake may have begun later than the events: what is older than its first is not known of
    assert [one.complete_from_us for one in pasts] == [START_US, START_US, START_US, None]
