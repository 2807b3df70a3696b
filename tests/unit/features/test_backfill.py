"""A view that is new to a partition with a past: computed, merged, offered; each event once."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from causemesh.bus.partitioner import partitions_of
from causemesh.checkpoints import CheckpointSettings, StateKeeper
from causemesh.clock import SystemClock
from causemesh.errors import Retryable
from causemesh.runner import NEVER, Batch
from causemesh.runner.marks import HighWaterMarks
from services.features.backfill.book import Backfills
from services.features.backfill.filling import Filling, Made, Order, TopicPass, needed_from_us
from services.features.backfill.log_past import Beginning
from services.features.backfill.pasts import Tell, complete_from
from services.features.backfill.running import Backfiller
from services.features.domain import parts
from services.features.domain.parsing import parse_views
from services.features.handlers import Join
from services.features.plan import Plan, event_frame
from services.features.publishing import VECTORS
from services.features.rekey import Rekey
from services.features.rekeying import INPUTS
from tests.unit.checkpoints.memory import MemoryFiles
from tests.unit.features.test_handlers import (
    CATALOGUE,
    EVENTS,
    MS,
    SLICE_US,
    VERSIONS,
    batch,
    live,
)

# all but two are routed to the partition that is tested
SITES = [f"site{n}" for n in (10, 16, 17, 23, 27, 28, 0, 2)]
SENSORS = ["a", "b", "c"]
BODY: dict[str, Any] = {
    "own": {"event": "reading", "entity": "sensor", "tile": "10ms"},
    "moved": {"event": "reading", "entity": "site", "placement": "rekeyed", "tile": "10ms"},
    "shared": {
        "event": "reading",
        "entity": "site",
        "scope": "shared",
        "placement": "broadcast",
        "tile": "10ms",
    },
}
FIRST: dict[str, Any] = {
    "own": {"*": ["count 40ms"], "value": ["mean 20ms"]},
    "moved": {"value": ["sum 40ms", "last 20ms"]},
    "shared": {"value": ["max 40ms"]},
}
SECOND: dict[str, Any] = {
    "own": {"*": ["count 80ms", "age"], "value": ["latest", "std 40ms"]},
    "moved": {"*": ["count 160ms"], "value": ["distinct 160ms", "first 80ms"]},
    "shared": {"*": ["count 400ms"], "value": ["min 80ms", "p50 80ms"]},
}
V1 = parse_views({"views": {n: {**BODY[n], "features": FIRST[n]} for n in BODY}})
V2 = parse_views({"views": {f"{n}@v2": {**BODY[n], "features": SECOND[n]} for n in BODY}})
# the new ones come first: what stands for an old one in an input's index must not change
BOTH = [*V2, *V1]
NEW = [view.id for view in V2]
Rows = list[dict[str, Any]]


def registrations(*features: str) -> Batch:
    row = {"occurred_at": 0, "model": "m", "version": 1, "lane": "realtime", "required": []}
    return batch((VERSIONS, 0), [{**row, "features": [*features], "sequence": 1}], 0)


class Log:
    """The events of two partitions, and what re-keying by the old and the new views makes of them
    for partition 0, as it lies there: the old ones' up to somewhere, then all from before that."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.events: dict[int, Rows] = {}
        for partition in (0, 1):
            times = sorted(self.rng.randrange(0, 200) * MS for _ in range(40))
            times.sort(key=lambda at: at + self.rng.randint(0, 15) * MS)
            self.events[partition] = [self._event(at) for at in times]
        self.ends = {(EVENTS, k): len(rows) - 1 for k, rows in self.events.items()}

    def _event(self, at_us: int) -> dict[str, Any]:
        value = self.rng.choice([None, round(self.rng.gauss(0, 5), 3)])
        site = self.rng.choice([*SITES, None])
        sensor = self.rng.choice(SENSORS)
        return {"occurred_at": at_us, "sensor": sensor, "site": site, "value": value}

    async def rekeyed(self, views: Sequence[Any], partition: int, after: int, until: int) -> Rows:
        """What the re-keying stage sends to partition 0 for the events at (after, until]."""
        rows = self.events[partition][after + 1 : until + 1]
        if not rows:
            return []
        unit = batch((EVENTS, partition), rows, after + 1)
        stage = Rekey(views)
        (out,) = (await stage.process([unit], 0, None)).outgoing
        chosen = partitions_of(out.keys, 4, unkeyed=partition)
        assert out.indexes is not None
        found = zip(
            out.frame.to_dicts(), out.positions.tolist(), out.indexes.tolist(), chosen, strict=True
        )
        cause = {"topic": EVENTS, "partition": partition, "origin": None}
        return [
            {
                **row,
                "occurred_at": round(row["occurred_at"].timestamp() * 1e6),
                "cause": {**cause, "position": at, "index": index},
            }
            for row, at, index, to in found
            if to == 0
        ]


class Computed:
    """Pasts straight from the log's rows, as `Pasts` makes them from the lake and the log."""

    def __init__(self, log: Log) -> None:
        self._log = log

    async def compute(self, orders: Sequence[Order], tell: Tell) -> list[Made]:
        reading = TopicPass(orders, 4)
        for partition, rows in self._log.events.items():
            half = len(rows) // 2
            for start, part in ((0, rows[:half]), (half, rows[half:])):
                unit = batch((EVENTS, partition), part, start)
                reading.take(event_frame(unit))
        tell(63)
        return reading.made(dict.fromkeys(range(4)))


class Reading:
    """A partition's reading of its inputs: positions, and the marks that drop replays."""

    def __init__(self, log: Log, inputs: Rows) -> None:
        self._log = log
        self.sources: dict[tuple[str, int], Rows] = {
            **{(EVENTS, k): rows for k, rows in log.events.items()},
            (INPUTS, 0): inputs,
        }
        self.at = dict.fromkeys(self.sources, 0)
        self.marks = HighWaterMarks()

    @property
    def positions(self) -> Mapping[tuple[str, int], int]:
        return {source: at - 1 for source, at in self.at.items()}

    def unit(self, limits: Mapping[tuple[str, int], int]) -> list[Batch]:
        """Some records of some sources, none at or beyond the limits."""
        rng, batches = self._log.rng, []
        for source, rows in self.sources.items():
            end = min(limits[source], self.at[source] + rng.randint(0, 7), len(rows))
            if end <= self.at[source]:
                continue
            one = batch(source, rows[self.at[source] : end], self.at[source])
            if source[0] == INPUTS:
                keep = self.marks.fresh(source, one.frame["cause"].struct.unnest())
                one = one.without(np.flatnonzero(~keep).tolist())
            self.at[source] = end
            batches.append(one)
        return batches

    def watermark_us(self) -> int:
        """Nothing left is older, but now and then something is a little late."""
        left = [
            int(row["occurred_at"])
            for source, rows in self.sources.items()
            for row in rows[self.at[source] :]
        ]
        return min(left, default=210 * MS) + self._log.rng.choice([0, 0, 10 * MS])


def join(views: Sequence[Any], reading: Reading | None = None, log: Log | None = None) -> Join:
    async def ends(topics: Sequence[str]) -> Mapping[tuple[str, int], int]:
        assert log is not None
        return {(EVENTS, k): log.ends.get((EVENTS, k), -1) for k in range(4)}

    return Join(
        Plan.of(views),
        CATALOGUE,
        0,
        slice_us=SLICE_US,
        clock=SystemClock(),
        publish_seconds=None,
        positions=(lambda: reading.positions) if reading is not None else dict,
        ends=ends,
    )


def answers(processor: Join) -> dict[str, bytes]:
    """What the new views answer about everyone, now and later."""
    found = {}
    for name in NEW:
        state = processor.state.store.views[name]
        keys = [*SENSORS, *SITES]
        whole = [f"t\x1f{key}" if state.view.scope == "tenant" else key for key in keys] * 3
        as_of = np.repeat(np.array([220, 240, 280]) * MS, len(keys))
        found[name] = state.answer(whole, as_of).tobytes()
    return found


def backfiller(processor: Join, log: Log) -> Backfiller:
    return Backfiller(lambda: [processor], Computed(log), SystemClock())


async def clean(log: Log) -> dict[str, bytes]:
    """What a partition answers that had all views from the beginning."""
    inputs = [row for k in (0, 1) for row in await log.rekeyed(BOTH, k, -1, 99)]
    reading, processor = Reading(log, inputs), join(BOTH)
    whole = {source: len(rows) for source, rows in reading.sources.items()}
    while any(reading.at[source] < end for source, end in whole.items()):
        await processor.process(reading.unit(whole), NEVER, None)
    await processor.process([], 210 * MS, None)
    return answers(processor)


class Upgrade:
    """A partition that began with the old views and goes on with both."""

    def __init__(self, seed: int, files: MemoryFiles | None = None) -> None:
        self.log = Log(seed)
        self._settings = None if files is None else CheckpointSettings(files, 0)
        self._epoch = 0

    async def run(self, restarts: float = 0.0) -> dict[str, bytes]:
        log, rng = self.log, self.log.rng
        sent = {k: rng.randint(0, 30) for k in (0, 1)}  # by the old re-keying stage
        old = [row for k in (0, 1) for row in await log.rekeyed(V1, k, -1, sent[k])]
        again = {k: rng.randint(-1, at) for k, at in sent.items()}  # it had committed less
        new = [row for k in (0, 1) for row in await log.rekeyed(BOTH, k, again[k], 99)]
        self.reading = reading = Reading(log, [*old, *new])
        begun = {(EVENTS, k): rng.randint(0, 35) for k in (0, 1)}
        processor = join(V1)
        await processor.process([registrations("own.count_40ms")], NEVER, None)
        limits = {**begun, (INPUTS, 0): rng.randint(0, len(old))}
        while any(reading.at[source] < end for source, end in limits.items()):
            await processor.process(reading.unit(limits), reading.watermark_us(), None)
        log.ends = {(EVENTS, k): rng.randint(max(sent[k], begun[(EVENTS, k)]), 39) for k in (0, 1)}
        whole = {source: len(rows) for source, rows in reading.sources.items()}
        processor, keeper = await self._restarted(processor.snapshot())
        idle = rng.randint(0, 12)
        saved: tuple[bytes | None, Mapping[Any, int], Any] | None = None
        while processor.backfills.held or any(reading.at[s] < end for s, end in whole.items()):
            await processor.process(reading.unit(whole), reading.watermark_us(), None)
            idle -= 1
            if idle < 0:
                await backfiller(processor, log).step()
            if rng.random() < 0.3:
                state = await (await keeper.save()).written()
                saved = state, dict(reading.at), reading.marks.dump()
                keeper.committed()
                await keeper.close()
            elif saved is not None and rng.random() < restarts:
                reading.at = dict(saved[1])
                reading.marks.load(saved[2])
                processor, keeper = await self._restarted(saved[0])
        await processor.process([], 210 * MS, None)
        return answers(processor)

    async def _restarted(self, state: bytes | None) -> tuple[Join, StateKeeper]:
        processor = join(BOTH, self.reading, self.log)
        keeper = StateKeeper(processor, self._settings)
        self._epoch += 1
        await keeper.restore(state, "features", 0, self._epoch)
        await keeper.close()
        return processor, keeper


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**20), st.sampled_from([0.0, 0.2]), st.booleans())
def test_a_new_view_answers_as_if_it_had_always_been(
    seed: int, restarts: float, in_files: bool
) -> None:
    upgrade = Upgrade(seed, MemoryFiles() if in_files else None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "PIECE_BYTES", 1)
        patch.setattr(parts, "LEAST_ROWS", 2)
        found = asyncio.run(upgrade.run(restarts))
    assert found == asyncio.run(clean(upgrade.log))


def test_control_what_changed_in_a_past_just_merged_can_not_be_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Join, "replaced", lambda self: False)
    monkeypatch.setattr(parts, "LEAST_ROWS", 2)
    monkeypatch.setattr(parts, "PIECE_BYTES", 1)
    with pytest.raises(AssertionError):  # nothing is noted of it
        asyncio.run(Upgrade(1, MemoryFiles()).run(0.2))


@pytest.mark.parametrize("off", [-1, 1])
async def test_control_another_cut_for_the_past_than_for_what_comes_live_is_wrong(
    off: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    orders = Backfills.orders

    def moved(book: Backfills, until_us: int | None) -> list[Order]:
        return [
            replace(order, cuts={k: at + off for k, at in order.cuts.items()})
            for order in orders(book, until_us)
        ]

    monkeypatch.setattr(Backfills, "orders", moved)
    wrong = 0
    for seed in range(8):
        upgrade = Upgrade(seed)
        wrong += await upgrade.run() != await clean(upgrade.log)
    assert wrong


async def test_control_without_the_guard_what_is_re_keyed_counts_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        Backfills, "since_the_cut", lambda _, view, events, positions: (view, events, positions)
    )
    wrong = 0
    for seed in range(8):
        upgrade = Upgrade(seed)
        wrong += await upgrade.run() != await clean(upgrade.log)
    assert wrong


def failures(emission: Any) -> list[str | None]:
    return [text for part in emission.outgoing for text in part.frame["failure"].to_list()]


async def upgraded(log: Log) -> Join:
    """A partition with both, just restarted, that had read some with the old views."""
    reading = Reading(log, [])
    processor = join(V1)
    await processor.process([registrations("own@v2.count_80ms")], NEVER, None)
    limits = dict.fromkeys(reading.sources, 10)
    await processor.process(reading.unit(limits), 0, None)
    after = join(BOTH, reading, log)
    after.restore(processor.snapshot())
    return after


async def test_it_is_offered_once_its_completion_is_committed() -> None:
    log = Log(3)
    processor = await upgraded(log)
    asked = {"version": 1, "entities": [{"name": "sensor", "value": "a"}]}
    first = await processor.process([live(0, **asked)], 0, None)
    reason = "view_backfilling: view own@v2 is being computed from past events: "
    assert failures(first) == [reason + "0%"]
    assert not first.commit
    assert processor.backfills.shown("own@v2").state == "backfilling"
    assert processor.backfills.shown("own@v1").state == "offered"

    await backfiller(processor, log).step()
    merged = await processor.process([live(1, **asked)], 0, None)
    assert merged.commit
    assert failures(merged) == [reason + "63%"], "the commit may still fail"
    assert processor.backfills.shown("own@v2").state == "committing"
    state = processor.snapshot()
    processor.committed()
    answered = await processor.process([live(2, **asked)], 0, None)
    assert failures(answered) == [None]
    assert processor.backfills.held == frozenset()

    following = join(BOTH, None, log)
    following.restore(state)
    assert following.backfills.held == frozenset()
    assert following.backfills.orders(None) == []
    assert failures(await following.process([live(2, **asked)], 0, None)) == [None]


async def test_a_crash_before_the_commit_computes_it_again() -> None:
    log = Log(4)
    processor = await upgraded(log)
    await processor.process([], 0, None)
    state = processor.snapshot()
    await backfiller(processor, log).step()
    assert (await processor.process([], 0, None)).commit
    following = join(BOTH, None, log)
    following.restore(state)  # what was merged is not in it
    assert following.backfills.held == frozenset(NEW)
    assert {order.view.id for order in following.backfills.orders(None)} == set(NEW)


async def test_a_partition_that_begins_with_the_log_lacks_nothing() -> None:
    processor = join(BOTH)
    assert processor.backfills.held == frozenset()


async def test_vectors_of_a_view_are_published_from_when_it_is_offered() -> None:
    log = Log(5)
    processor = await upgraded(log)
    processor._publisher._seconds = 0.0
    unit = batch(
        (EVENTS, 1), [{"occurred_at": 90 * MS, "sensor": "a", "site": "s", "value": 1.0}], 39
    )

    def published(emission: Any) -> set[str]:
        return {
            name
            for part in emission.outgoing
            if part.topic == VECTORS
            for name in part.frame["view"].to_list()
        }

    assert not published(await processor.process([unit], 200 * MS, None)) & set(NEW)
    await backfiller(processor, log).step()
    assert not published(await processor.process([], 210 * MS, None)) & set(NEW)
    processor.snapshot()
    assert not published(await processor.process([], 215 * MS, None)) & set(NEW)
    processor.committed()
    assert "shared@v2" in published(await processor.process([], 220 * MS, None))


async def test_a_view_that_is_no_longer_declared_is_forgotten() -> None:
    log = Log(6)
    processor = await upgraded(log)
    await processor.process([], 0, None)
    saved = Backfills(V1, CATALOGUE, 0)
    saved.load(processor.backfills.dump())
    assert saved.held == frozenset()


async def test_what_is_away_is_waited_for_and_told() -> None:
    log = Log(7)
    processor = await upgraded(log)
    await processor.process([], 0, None)

    class Away:
        async def compute(self, orders: Sequence[Order], tell: Tell) -> list[Made]:
            raise Retryable("the lake's catalog is away", retry_after=0.0)

    await Backfiller(lambda: [processor], Away(), SystemClock()).step()
    assert processor.backfills.shown("own@v2").waits == "the lake's catalog is away"
    await backfiller(processor, log).step()
    assert processor.backfills.shown("own@v2").waits is None
    assert (await processor.process([], 0, None)).commit


def test_what_no_answer_can_see_is_not_needed() -> None:
    own, _, shared = V2
    assert needed_from_us(own, 1000 * MS) is None  # the latest value, of any age
    assert needed_from_us(shared, 1000 * MS) == 600 * MS
    short = parse_views(
        {"views": {"v": {**BODY["own"], "features": {"value": ["latest"]}, "retention": "100ms"}}}
    )[0]
    assert needed_from_us(short, 1000 * MS) == 900 * MS
    fixed = parse_views(
        {
            "views": {
                "v": {**BODY["own"], "features": {"*": ["count 40ms"]}, "corrects": "site"},
            }
        }
    )[0]
    assert needed_from_us(fixed, 1000 * MS) == 920 * MS


def test_a_record_that_the_view_can_not_take_is_left_out_and_counted() -> None:
    rows = [
        {"occurred_at": at * MS, "sensor": "a", "site": "s", "value": value}
        for at, value in ((1, 1.0), (2, 1e300), (3, 2.0))
    ]
    view = V2[0]
    order = Order(view, 0, {0: 2}, None)
    reading = TopicPass([order], 4)
    reading.take(event_frame(batch((EVENTS, 0), rows, 0)))
    (made,) = reading.made({0: None})
    assert (made.events, made.unfit) == (2, 1)
    assert made.ahead.position.tolist() == [0, 2]


@pytest.mark.parametrize(
    ("needed", "lake", "begins", "gap", "cut", "want"),
    [
        (None, None, None, False, -1, None),  # nothing was ever written
        (50, 40, None, False, 9, None),  # the log is empty; the lake goes back far enough
        (30, 40, None, False, 9, 40),
        (None, 40, None, False, 9, 40),
        (None, 40, Beginning(0, 10), False, 9, None),  # nothing was ever deleted from the log
        (None, None, Beginning(0, 10), False, 9, None),
        (None, None, Beginning(5, 10), False, 9, 10),
        (20, None, Beginning(5, 10), False, 9, None),
        (None, 40, Beginning(5, 10), False, 9, 10),
        (None, None, None, False, 9, 2**62),  # neither has any
        (50, 40, Beginning(8, 60), True, 9, 60),  # the log begins behind where the lake ends
    ],
)
def test_since_when_a_past_is_complete(
    *,
    needed: int | None,
    lake: int | None,
    begins: Beginning | None,
    gap: bool,
    cut: int,
    want: int | None,
) -> None:
    assert complete_from(needed, lake, begins, gap=gap, cut=cut) == want


def test_each_view_is_told_what_its_own_answers_lack() -> None:
    short, long = V2[2], V2[0]
    orders = [Order(short, 0, {0: 1}, 1000 * MS), Order(long, 0, {0: 1}, 1000 * MS)]
    reading = TopicPass(orders, 4)
    found = [made.complete_from_us for made in reading.made({0: 500 * MS})]
    assert found == [None, 500 * MS]
    assert [one.complete_from_us for one in reading.made({0: 2**62})] == [1000 * MS] * 2
    assert Filling(orders[0]).made(None).events == 0


def test_requests_are_routed_where_the_past_of_a_re_keyed_view_is() -> None:
    rows = [
        {"occurred_at": n * MS, "sensor": "a", "site": site, "value": 1.0}
        for n, site in enumerate(SITES)
    ]
    orders = [Order(V2[1], partition, {0: 99}, None) for partition in range(4)]
    reading = TopicPass(orders, 4)
    reading.take(event_frame(batch((EVENTS, 0), rows, 0)))
    want = partitions_of([site.encode() for site in SITES], 4, unkeyed=0)
    for partition, made in enumerate(reading.made({0: None})):
        mine = {f"t\x1f{site}" for site, at in zip(SITES, want, strict=True) if at == partition}
        assert set(made.ahead.entity) == mine
    assert sorted(np.bincount(want, minlength=4).tolist()) == [0, 1, 1, 6]
