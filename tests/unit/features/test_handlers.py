"""The joining processor: a replay's tasks depend on the logs alone, and leave by position."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from causemesh.bus.base import RawBatch
from causemesh.catalogue import Catalogue
from causemesh.clock import SystemClock
from causemesh.codec.columns import frame_schema
from causemesh.runner import NEVER, Batch, Outgoing
from causemesh.runner.marks import HighWaterMarks
from services.features.domain.events import Ints
from services.features.domain.late import Behind
from services.features.domain.models import UNRESOLVED
from services.features.domain.parsing import parse_views
from services.features.handlers import Join
from services.features.lateness import LATE, Late, late_records, tells
from services.features.plan import REQUESTS, ROLLOUTS, VERSIONS, Plan, event_frame, tasks_topic
from services.features.publishing import VECTORS
from services.features.reading import read_views
from services.features.rekey import Rekey
from services.features.rekeying import INPUTS, view_index
from services.features.requests import packed_inputs
from tests.unit.features.reference import Event, expected

MS = 1_000
SLICE_US = 10 * MS
FOREVER = 10**12
EVENTS = "events.reading"
CATALOGUE = Catalogue.load([Path(__file__).parents[3] / "tests" / "project"])
VIEWS = parse_views(
    {
        "views": {
            "own": {
                "event": "reading",
                "entity": "sensor",
                "features": {"*": ["count 40ms"], "value": ["mean 20ms", "latest"]},
                "tile": "10ms",
            },
            "moved": {
                "event": "reading",
                "entity": "site",
                "placement": "rekeyed",
                "features": {"value": ["sum 40ms", "last 20ms"]},
                "tile": "10ms",
            },
            "shared": {
                "event": "reading",
                "entity": "site",
                "scope": "shared",
                "placement": "broadcast",
                "features": {"value": ["max 40ms"]},
                "tile": "10ms",
            },
        }
    }
)
PLAN = Plan.of(VIEWS)
FEATURES = [name for view in VIEWS for name in view.feature_names]
SIGNATURES = {1: [*FEATURES, "input.x"], 2: ["input.x", "shared.value_max_40ms"]}
Log = list[dict[str, Any]]
Source = tuple[str, int]


def join(publish_seconds: float | None = None) -> Join:
    clock = SystemClock()
    return Join(PLAN, CATALOGUE, 0, slice_us=SLICE_US, clock=clock, publish_seconds=publish_seconds)


def batch(source: Source, rows: Sequence[Mapping[str, Any]], start: int) -> Batch:
    topic, partition = source
    record = CATALOGUE.topic(topic).record
    cause = {"topic": "inbox", "partition": partition, "index": 0, "origin": None}
    whole = [
        {
            "event_id": f"{start + n}",
            "tenant_id": "t",
            "cause": {**cause, "position": start + n},
            **row,
        }
        for n, row in enumerate(rows)
    ]
    names = [one["name"] for one in record["fields"]]
    frame = pl.DataFrame(
        [[row.get(name) for name in names] for row in whole],
        schema=frame_schema(record),
        orient="row",
    )
    positions = np.arange(start, start + len(rows))
    raw = RawBatch(topic, partition, positions, [b"k"] * len(rows), [b""] * len(rows), positions)
    return Batch(topic, partition, frame, np.arange(len(rows)), raw)


@dataclass
class World:
    """The logs of two event partitions, what re-keying makes of them, and requests."""

    seed: int
    mode: str
    logs: dict[Source, Log] = field(default_factory=dict)

    async def make(self) -> World:
        rng = random.Random(self.seed)
        for partition in (0, 1):
            times = sorted(rng.randrange(0, 120) * MS for _ in range(25))
            times.sort(key=lambda at: at + rng.randint(0, 15) * MS)
            self.logs[EVENTS, partition] = [self._event(rng, at) for at in times]
        self.logs[INPUTS, 0] = [row async for row in self._rekeyed()]
        times = [rng.randrange(0, 130) * MS for _ in range(20)]
        self.logs[REQUESTS, 0] = [self._request(rng, at) for at in times]
        return self

    @staticmethod
    def _event(rng: random.Random, at_us: int) -> dict[str, Any]:
        value = rng.choice([None, round(rng.gauss(0, 5), 3)])
        site = rng.choice(["n", "s", None])
        return {"occurred_at": at_us, "sensor": rng.choice("ab"), "site": site, "value": value}

    def _request(self, rng: random.Random, at_us: int) -> dict[str, Any]:
        entities = {"sensor": rng.choice(["a", "b", None]), "site": rng.choice("ns")}
        return {
            "occurred_at": at_us,
            "model": "m",
            "version": rng.choice([1, 2, 2, 7]),
            "mode": self.mode,
            "entities": [{"name": name, "value": value} for name, value in entities.items()],
            "inputs": rng.choice([[], [{"name": "x", "value": float(at_us)}]]),
        }

    async def _rekeyed(self) -> Any:
        processor = Rekey(VIEWS)
        for partition in (0, 1):
            unit = batch((EVENTS, partition), self.logs[EVENTS, partition], 0)
            (out,) = (await processor.process([unit], 0, None)).outgoing
            for row, position in zip(out.frame.to_dicts(), out.positions.tolist(), strict=True):
                cause = {"topic": EVENTS, "partition": partition, "position": position}
                at_us = row["occurred_at"]
                yield {**row, "occurred_at": at_us, "cause": {**cause, "index": 0, "origin": None}}

    def units(self, rng: random.Random) -> Iterator[tuple[list[Batch], int]]:
        """The logs cut and interleaved at random, with the watermark that the rest allows."""
        at = dict.fromkeys(self.logs, 0)
        while any(at[source] < len(log) for source, log in self.logs.items()):
            batches = []
            for source in rng.sample(sorted(self.logs), rng.randint(1, len(self.logs))):
                rows = self.logs[source][at[source] : at[source] + rng.randint(1, 6)]
                if rows:
                    batches.append(batch(source, rows, at[source]))
                    at[source] += len(rows)
            rest = [
                _us(row["occurred_at"])
                for source, log in self.logs.items()
                for row in log[at[source] :]
            ]
            yield batches, min(rest, default=FOREVER)
        yield [], FOREVER

    async def tasks(self, order: int, restores: float = 0.0) -> list[tuple[Any, ...]]:
        """What is emitted: position, version, vector, failure. Restarts where chance says."""
        rng = random.Random(order)
        processor = join()
        await processor.process([registrations()], NEVER, None)
        emitted: list[tuple[Any, ...]] = []
        for batches, watermark_us in self.units(rng):
            emission = await processor.process(batches, watermark_us, None)
            for part in emission.outgoing:
                assert part.topic == tasks_topic("realtime")
                columns = part.frame.select("version", "vector", "failure").rows()
                emitted += [
                    (at, *row) for at, row in zip(part.positions.tolist(), columns, strict=True)
                ]
            if rng.random() < restores:
                saved = processor.snapshot()
                processor = join()
                processor.restore(saved)
        return emitted

    def answers(self) -> list[tuple[Any, ...]]:
        """The pure answer to each request, in position order."""
        return [
            (position, *self._answer(row)) for position, row in enumerate(self.logs[REQUESTS, 0])
        ]

    def _answer(self, request: dict[str, Any]) -> tuple[Any, ...]:
        version = request["version"]
        if version not in SIGNATURES:
            return version, b"", f"unknown_model: no version m@{version}"
        as_of_us = request["occurred_at"] // SLICE_US * SLICE_US
        named = {one["name"]: one["value"] for one in request["entities"]}
        numbers = {"input.x": next((one["value"] for one in request["inputs"]), np.nan)}
        for view in VIEWS:
            entity = named[view.request_entity[0]]
            found = expected(view, self._events(view), entity, as_of_us)
            numbers |= dict(zip(view.feature_names, found, strict=True))
        vector = np.array([numbers[name] for name in SIGNATURES[version]], "<f4")
        missing = version == 1 and np.isnan(vector[-1])
        return version, vector.tobytes(), "missing_feature: input.x" if missing else None

    def _events(self, view: Any) -> list[Event]:
        partitions = (0,) if view.placement == "partitioned" else (0, 1)
        return [
            Event(
                row[view.entity[0]],
                row["occurred_at"],
                partition,
                position,
                (row["value"],),
            )
            for partition in partitions
            for position, row in enumerate(self.logs[EVENTS, partition])
        ]


def _us(instant: Any) -> int:
    return instant if isinstance(instant, int) else round(instant.timestamp() * 1e6)


def registrations() -> Batch:
    """Two versions of model m; the first asks for its input."""
    rows = [
        {
            "model": "m",
            "version": version,
            "lane": "realtime",
            "features": features,
            "required": ["input.x"] if version == 1 else [],
            "artefact_sha256": "sha",
            "reference": [],
            "metrics": [],
            "sequence": version,
            "occurred_at": 0,
        }
        for version, features in SIGNATURES.items()
    ]
    return batch((VERSIONS, 0), rows, 0)


seeds = st.integers(0, 2**32)


@settings(deadline=None, max_examples=6)
@given(seeds, seeds)
async def test_a_replay_is_the_pure_answer_in_any_interleaving(seed: int, order: int) -> None:
    world = await World(seed, "replay").make()
    answers = world.answers()
    assert await world.tasks(order) == answers
    assert await world.tasks(order + 1) == answers


@settings(deadline=None, max_examples=5)
@given(seeds, seeds)
async def test_restarts_in_the_middle_do_not_show(seed: int, order: int) -> None:
    world = await World(seed, "replay").make()
    assert await world.tasks(order, restores=0.5) == world.answers()


async def test_live_requests_see_what_has_come_and_so_differ() -> None:
    """The control of the two above: the interleavings are different indeed."""
    world = await World(1, "live").make()
    one, other = await world.tasks(1), await world.tasks(2)
    assert [row[0] for row in one] == [row[0] for row in other] == list(range(20))
    assert one != other
    assert await world.tasks(1, restores=0.5) == await world.tasks(1, restores=0.5)


def live(position: int, **more: Any) -> Batch:
    """One live request, after 100 ms."""
    row = {"occurred_at": 100 * MS, "model": "m", "version": 2, "mode": "live", "entities": []}
    return batch(
        (REQUESTS, 0), [{**row, "inputs": [{"name": "x", "value": 1.0}], **more}], position
    )


async def test_few_requests_are_packed_as_many_are() -> None:
    """Few go one by one, many by columns: the same bytes."""
    processor = join()
    await processor.process([registrations()], 0, None)
    names = ["m@1", UNRESOLVED, "m@2", "m@1", "m@1"] * 60
    numbers = [[("x", 0.1)], [("x", 1.0)], [("y", 2.0), ("x", 1e30)], None, [("x", None)]] * 60
    rows = [
        pairs and [{"name": name, "value": value} for name, value in pairs] for pairs in numbers
    ]
    inputs = pl.Series(rows, dtype=pl.List(pl.Struct({"name": pl.String, "value": pl.Float64})))
    signatures = pl.Series(names)
    many = packed_inputs(processor.book, signatures, inputs).to_list()
    few = [
        row
        for at in range(0, 300, 5)
        for row in packed_inputs(processor.book, signatures[at : at + 5], inputs[at : at + 5])
    ]
    assert few == many
    assert {len(one) for one in many} == {0, 4}


def event(value: float, at_us: int, position: int, site: str = "n") -> Batch:
    row = {"occurred_at": at_us, "sensor": "a", "site": site, "value": value}
    return batch((EVENTS, 1), [row], position)


def vectors(emission: Any) -> list[list[float]]:
    return [
        np.frombuffer(vector, "<f4").tolist()
        for part in emission.outgoing
        for vector in part.frame["vector"]
    ]


async def test_a_live_request_sees_what_was_applied_before_it() -> None:
    processor = join()
    await processor.process([registrations()], NEVER, None)
    asked = {"entities": [{"name": "site", "value": "n"}]}
    ((x, unseen),) = vectors(await processor.process([live(0, **asked)], 0, None))
    assert (x, np.isnan(unseen)) == (1.0, True)
    together = [live(1, **asked), event(5.0, 90 * MS, 0)]
    assert vectors(await processor.process(together, 0, None)) == [[1.0, 5.0]]
    # An event after the request's own time is not seen, though it is here.
    await processor.process([event(9.0, 101 * MS, 1)], 0, None)
    assert vectors(await processor.process([live(2, **asked)], 0, None)) == [[1.0, 5.0]]


async def test_failures_leave_in_position_order_too() -> None:
    """A held replay request holds back what is behind it, whatever became of that."""
    processor = join()
    await processor.process([registrations()], NEVER, None)
    held = await processor.process([live(0, mode="replay")], 0, None)
    behind = [live(1, version=9), live(2, version=1, inputs=[]), live(3)]
    later = await processor.process(behind, 0, None)
    assert [*held.outgoing, *later.outgoing] == []
    assert later.promises == {REQUESTS: 0}
    free = await processor.process([], 100 * MS, None)
    (tasks,) = free.outgoing
    assert tasks.positions.tolist() == [0, 1, 2, 3]
    assert tasks.frame["failure"].to_list() == [
        None,
        "unknown_model: no version m@9",
        "missing_feature: input.x",
        None,
    ]
    assert free.promises == {REQUESTS: 100 * MS}


async def test_a_schedule_from_the_log_answers_as_of_the_request() -> None:
    processor = join()
    schedule = [{"version": 2, "effective_at": 100 * MS}, {"version": 1, "effective_at": 50 * MS}]
    row = {"model": "m", "schedule": schedule, "sequence": 3, "occurred_at": 0}
    learned = [registrations(), batch((ROLLOUTS, 0), [row], 0)]
    await processor.process(learned, NEVER, None)
    times = [live(n, version=None, occurred_at=at * MS) for n, at in enumerate((49, 50, 99, 100))]
    (tasks,) = (await processor.process(times, 0, None)).outgoing
    assert tasks.frame["version"].to_list() == [0, 1, 1, 2]


async def test_the_current_vector_is_published_with_its_cause() -> None:
    processor = join(publish_seconds=0)
    both = [("a", 7), ("b", 8), ("c", 9), ("d", 10)]
    for site, position in both:
        early = await processor.process([event(5.0, 90 * MS, position, site)], 0, None)
        assert early.outgoing == []  # not applied yet
    emission = await processor.process([event(6.0, 95 * MS, 11, "a")], 100 * MS, None)
    (part,) = [part for part in emission.outgoing if part.frame["view"][0] == "shared@v1"]
    # Of an entity that every partition holds, one publishes.
    mine = {site for site, _ in both if zlib.crc32(f"shared@v1\x1f{site}".encode()) % 4 == 0}
    assert set(part.frame["entity"]) == mine != set()
    assert (part.topic, part.cause_topic, part.cause_partition) == (VECTORS, EVENTS, 1)
    assert set(part.positions.tolist()) == {11}
    assert set(part.frame["sequence"].to_list()) == {100 * MS}


async def test_a_row_that_a_view_cannot_take_is_refused_for_that_view_alone() -> None:
    """The other views count it, and the other rows count for the view."""
    shared = {"event": "reading", "entity": "site", "placement": "broadcast", "scope": "shared"}
    views = parse_views(
        {
            "views": {
                "numbers": {**shared, "features": {"value": ["max 40ms"]}},
                "visits": {**shared, "features": {"*": ["count 40ms"]}},
            }
        }
    )
    processor, without = (
        Join(Plan.of(views), CATALOGUE, 0, slice_us=SLICE_US, clock=SystemClock(),
             publish_seconds=None)
        for _ in range(2)
    )  # fmt: skip
    good, bad = event(5.0, 80 * MS, 0), event(1e30, 90 * MS, 1)
    emission = await processor.process([good, bad], 100 * MS, None)
    await without.process([good], 100 * MS, None)
    ((batch, rows),) = emission.refused
    assert (batch, list(rows)) == (bad, [0])
    assert "view numbers: " in rows[0]
    found, expected = (one.state.store.views for one in (processor, without))
    same = {name: state.snapshot() == expected[name].snapshot() for name, state in found.items()}
    assert same == {"numbers@v1": True, "visits@v1": False}


async def test_a_schedule_counts_as_known_when_it_can_not_be_forgotten() -> None:
    """What a crash could still take back is not told: requests would be sent that the next process
    may read before the schedule."""
    row = {"occurred_at": 0, "model": "m", "schedule": [{"version": 1, "effective_at": 0}]}
    processor = join()
    await processor.process([registrations(), batch((ROLLOUTS, 0), [row], 0)], NEVER, None)
    assert processor.models()["schedules"] == {}
    state = processor.snapshot()
    await processor.process([], NEVER, None)
    assert processor.models()["schedules"] == {}, "the commit may still fail"
    processor.committed()
    known = {"m": [{"version": 1, "effective_us": 0}]}
    assert processor.models()["schedules"] == known
    following = join()
    following.restore(state)
    assert following.models()["schedules"] == known


async def test_an_event_too_late_for_a_view_is_sent_on_with_its_cause_and_counted() -> None:
    counted: list[tuple[str, str, int]] = []
    processor = join()
    processor._count = lambda *what: counted.append(what)
    await processor.process([registrations()], 100 * MS, None)
    rows = [
        {"occurred_at": at * MS, "sensor": "a", "site": "n", "value": 2.5} for at in (95, 30, 99)
    ]
    unit = await processor.process([batch((EVENTS, 0), rows, 7)], 100 * MS, None)
    (part,) = [part for part in unit.outgoing if part.topic == LATE]
    # `own` keeps the latest value, so no event is too late for it; `shared` has windows alone
    own, _, shared = VIEWS
    told = zip(
        part.positions.tolist(),
        cast(Ints, part.indexes).tolist(),
        part.frame.select("view", "entity", "tenant_id", "taken").rows(),
        strict=True,
    )
    assert sorted(told) == sorted(
        (position, view_index(view), (view.id, key, "t", view is own or position != 8))
        for position in (7, 8, 9)
        for view, key in ((own, "t\x1fa"), (shared, "n"))
    )
    (missed,) = part.frame.filter(~pl.col("taken")).to_dicts()
    assert np.frombuffer(missed["columns"], "<f8").tolist() == [2.5 * 1024]
    assert _us(missed["occurred_at"]) == 30 * MS
    assert {_us(at) for at in part.frame["applied_until"]} == {100 * MS}
    assert sorted(counted) == [
        ("events_missed", "shared@v1", 1),
        ("events_taken_late", "own@v1", 3),
        ("events_taken_late", "shared@v1", 2),
    ]


async def late_of_two(told: Told) -> None:
    """Two partitions that read the same events of a broadcast view, with watermarks of their own:
    the first is ahead. What each sends of them is added to `told`, with the partition."""
    rows = [{"occurred_at": at * MS, "sensor": "a", "site": "n", "value": 1.0} for at in (5, 95)]
    for partition, watermark_us in ((0, 100 * MS), (1, 60 * MS)):
        processor = Join(
            PLAN,
            CATALOGUE,
            partition,
            slice_us=SLICE_US,
            clock=SystemClock(),
            publish_seconds=None,
            count=lambda *what, by=partition: told.counted.append((by, *what)),
        )
        await processor.process([registrations()], watermark_us, None)
        for start in (0, 2):
            unit = await processor.process([batch((EVENTS, 1), rows, start)], watermark_us, None)
            told.sent += [(partition, part) for part in unit.outgoing if part.topic == LATE]


@dataclass
class Told:
    sent: list[tuple[int, Outgoing]] = field(default_factory=list)
    counted: list[tuple[int, str, str, int]] = field(default_factory=list)

    def read(self) -> list[tuple[int, int]]:
        """Partition and cause of what a reader keeps of the records of the broadcast view."""
        marks, kept = HighWaterMarks(), []
        for partition, part in self.sent:
            causes = pl.DataFrame(
                {
                    "topic": [part.cause_topic] * len(part),
                    "partition": [part.cause_partition] * len(part),
                    "position": part.positions,
                    "index": cast(Ints, part.indexes),
                }
            )
            fresh = marks.fresh((LATE, 0), causes)
            mine = fresh & (part.frame["view"] == "shared@v1").to_numpy()
            kept += [(partition, at) for at in part.positions[mine].tolist()]
        return kept

    def missed(self) -> list[int]:
        """Who counted how many missed events of the view."""
        named = ("events_missed", "shared@v1")
        return [by for by, kind, view, n in self.counted for _ in range(n) if (kind, view) == named]


async def test_the_partition_of_an_event_s_number_tells_that_it_was_late(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All hold a broadcast view; readers would take what the slower of them sends for a replay."""
    told = Told()
    await late_of_two(told)
    assert told.read() == [(1, 0), (1, 2)]  # what was 5 ms and behind 60 ms; 95 ms was in time
    assert told.missed() == [1, 1]
    # control: where all tell, what partition 1 missed is lost, and counted twice
    monkeypatch.setattr("services.features.handlers.tells", lambda *_: True)
    told = Told()
    await late_of_two(told)
    assert told.read() == [(0, 0), (0, 1), (0, 2), (0, 3)]
    assert told.missed() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("partition", "number", "tell"), [(1, 1, True), (1, 5, True), (0, 5, False)]
)
def test_more_partitions_of_events_than_of_requests_have_one_each_that_tells(
    partition: int, number: int, tell: bool
) -> None:
    assert tells(partition, batch((EVENTS, number), [], 0), 4) is tell


async def test_another_view_changes_no_index_of_what_was_late() -> None:
    found = []
    for views in (VIEWS, VIEWS[2:], VIEWS[::-1]):
        late = Behind(np.array([0]), np.array([True]))
        view = views[[one.id for one in views].index("shared@v1")]
        unit = batch((EVENTS, 0), [{"occurred_at": 1, "site": "n", "value": 1.0}], 0)
        (events,), _ = read_views([view], event_frame(unit))
        part = late_records(unit, [Late(*events, unit.positions, late)], 10)
        found.append(cast(Ints, part.indexes).tolist())
    assert found[0] == found[1] == found[2]


async def test_a_late_re_keyed_input_names_the_input_s_own_position() -> None:
    processor = join()
    await processor.process([registrations()], 100 * MS, None)
    rekey = Rekey(VIEWS)
    rows = [{"occurred_at": at * MS, "sensor": "a", "site": "n", "value": 1.0} for at in (99, 20)]
    moved = await rekey.process([batch((EVENTS, 3), rows, 40)], NEVER, None)
    cause = {"topic": EVENTS, "partition": 3, "index": 0, "origin": None}
    inputs = [
        {**row, "cause": {**cause, "position": at}}
        for row, at in zip(moved.outgoing[0].frame.to_dicts(), (40, 41), strict=True)
    ]
    unit = await processor.process([batch((INPUTS, 0), inputs, 1000)], 100 * MS, None)
    (part,) = [part for part in unit.outgoing if part.topic == LATE]
    assert part.frame.select("view", "taken").rows() == [("moved@v1", True), ("moved@v1", False)]
    assert (part.cause_topic, part.positions.tolist()) == (INPUTS, [1000, 1001])
