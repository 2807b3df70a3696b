"""Event-time alignment: crashes, interleavings and batch sizes must not show in what is emitted."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from causemesh.errors import Misdeclared, Poison
from services.features.domain.definitions import FeatureView
from services.features.domain.engine import ViewState
from services.features.domain.failures import DefinitionError
from services.features.domain.parsing import parse_views
from services.features.domain.state import PartitionState
from tests.unit.features.reference import Event, expected

SLICE = 10
FOREVER = 10**6
VIEWS = parse_views(
    {
        "views": {
            "departures": {
                "event": "departed",
                "entity": ["carrier", "origin"],
                "columns": {"delay": "left_at - due_at", "late": "left_at - due_at >= 2"},
                "filter": "cancelled = 0",
                "windows": ["20ms", "40ms"],
                "tile": "10ms",
                "features": {
                    "*": ["count"],
                    "delay": ["mean", "std", "max", "last 40ms"],
                    "late": ["sum 20ms"],
                },
            },
            "weather": {
                "event": "observed",
                "entity": "origin",
                "scope": "shared",
                "features": {"temp": ["latest"], "*": ["age"]},
            },
        }
    }
)
MS = 1000  # the simulation counts in milliseconds
SIGNATURES = {
    "both": [name for view in VIEWS for name in view.feature_names],
    "few": ["weather.temp_latest", "departures.delay_mean_20ms"],
}
Record = tuple[str, int, dict[str, Any]]  # ("event" | "request" | "watermark", time, columns)


@dataclass
class World:
    """Logs of five sources with promises in them, all drawn from one seed."""

    rng: random.Random
    logs: dict[int, list[Record]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for source in (0, 1):
            self.logs[source] = self._log(25, self._departure)
        self.logs[2] = self._log(12, self._observation)
        for source in (3, 4):
            self.logs[source] = self._log(15, self._request)

    def _log(self, count: int, make: Callable[[], dict[str, Any]]) -> list[Record]:
        times = [self.rng.randrange(0, 120) * MS for _ in range(count)]
        arrival = sorted(times, key=lambda t: t + self.rng.randint(0, 15) * MS)
        log: list[Record] = []
        for place, time in enumerate(arrival):
            columns = {**make(), "occurred_at_us": time}
            log.append(("request" if "mode" in columns else "event", time, columns))
            if self.rng.random() < 0.4:
                rest = arrival[place + 1 :]
                log.append(("watermark", min(rest) if rest else FOREVER * MS, {}))
        return [*log, ("watermark", FOREVER * MS, {})]

    def _departure(self) -> dict[str, Any]:
        due = self.rng.randrange(100)
        left = self.rng.choice([None, due + self.rng.random() * 5])
        cancelled = float(self.rng.random() < 0.2)
        return {**self._keys(), "due_at": float(due), "left_at": left, "cancelled": cancelled}

    def _observation(self) -> dict[str, Any]:
        return {**self._keys(), "temp": self.rng.choice([None, self.rng.gauss(50, 20)])}

    def _request(self) -> dict[str, Any]:
        signature = self.rng.choice(list(SIGNATURES))
        return {**self._keys(), "mode": "replay", "signature": signature, "payload": b"p"}

    def _keys(self) -> dict[str, Any]:
        return {
            "tenant_id": self.rng.choice(["t1", "t2"]),
            "carrier": self.rng.choice(["AA", "UA", None]),
            "origin": self.rng.choice(["JFK", "LGA"]),
        }

    def records(self, kind: str) -> Iterator[tuple[int, int, dict[str, Any]]]:
        for source, log in self.logs.items():
            for position, (this, _, columns) in enumerate(log):
                if this == kind:
                    yield source, position, columns

    def answers(self) -> dict[tuple[int, int], bytes]:
        """The pure answer to each request, from the set of events alone."""
        events = {view.name: list(self._events(view)) for view in VIEWS}
        want = {}
        for source, position, columns in self.records("request"):
            as_of = columns["occurred_at_us"] // (SLICE * MS) * (SLICE * MS)
            numbers: dict[str, np.float32] = {}
            for view in VIEWS:
                vector = expected(view, events[view.name], key_of(view, columns), as_of)
                numbers |= dict(zip(view.feature_names, vector, strict=True))
            asked = [numbers[name] for name in SIGNATURES[columns["signature"]]]
            want[source, position] = np.array(asked, "<f4").tobytes()
        return want

    def _events(self, view: FeatureView) -> Iterator[Event]:
        for source, position, columns in self.records("event"):
            if view.name == "weather" and "temp" in columns:
                inputs: tuple[float | None, ...] = (columns["temp"],)
            elif view.name == "departures" and columns.get("cancelled") == 0:
                left, due = columns["left_at"], columns["due_at"]
                delay = None if left is None else left - due
                inputs = (delay, None if delay is None else float(delay >= 2))
            else:
                continue
            yield Event(key_of(view, columns), columns["occurred_at_us"], source, position, inputs)


def key_of(view: FeatureView, columns: dict[str, Any]) -> str | None:
    parts = [columns[name] for name in view.entity]
    tenant = columns["tenant_id"] if view.scope == "tenant" else ""
    return None if None in parts else repr((tenant, *parts))


SCHEMA = {
    "tenant_id": pl.String,
    "carrier": pl.String,
    "origin": pl.String,
    "occurred_at_us": pl.Int64,
    "source": pl.Int32,
    "position": pl.Int64,
    "left_at": pl.Float64,
    "due_at": pl.Float64,
    "cancelled": pl.Float64,
    "temp": pl.Float64,
    "mode": pl.String,
    "signature": pl.String,
    "payload": pl.Binary,
}


def frame_of(source: int, first: int, records: list[Record], kind: str) -> pl.DataFrame:
    rows = [
        {**columns, "source": source, "position": first + place}
        for place, (this, _, columns) in enumerate(records)
        if this == kind
    ]
    names = list(rows[0]) if rows else list(SCHEMA)
    return pl.DataFrame(rows, schema={name: SCHEMA[name] for name in names})


@dataclass
class Worker:
    """Feeds one partition from the logs, with a checkpoint now and then and a crash now and then.

    `emitted` is a topic: it keeps what was sent before a crash, and the sink drops replays by the
    high-water mark of each source, as the next consumer does.
    """

    world: World
    rng: random.Random
    crashes: bool = True
    save_buffers: bool = True
    hold: bool = True
    evicted: int = 0
    emitted: list[tuple[int, int, bytes]] = field(default_factory=list)

    def run(self) -> dict[tuple[int, int], bytes]:
        self._start(None)
        saved: tuple[bytes, dict[int, int], dict[int, int]] | None = None
        while any(at < len(self.world.logs[s]) for s, at in self.at.items()):
            self._step()
            if self.rng.random() < 0.3:
                saved = (self._snapshot(), dict(self.at), dict(self.marks))
            if self.crashes and self.rng.random() < 0.15:
                self._start(saved)
        self.state.advance(min(self.marks.values()))
        self._emit()
        return self._sink()

    def _start(self, saved: tuple[bytes, dict[int, int], dict[int, int]] | None) -> None:
        self.state = PartitionState(VIEWS, slice_us=SLICE * MS)
        for signature, names in SIGNATURES.items():
            self.state.declare(signature, names)
        self.at, self.marks = dict.fromkeys(self.world.logs, 0), dict.fromkeys(self.world.logs, -1)
        if saved is not None:
            assert self.state.restore(saved[0]) == []
            self.at, self.marks = dict(saved[1]), dict(saved[2])

    def _step(self) -> None:
        source = self.rng.choice([s for s, at in self.at.items() if at < len(self.world.logs[s])])
        first = self.at[source]
        records = self.world.logs[source][first : first + self.rng.randint(1, 8)]
        self.at[source] += len(records)
        event_type = "observed" if source == 2 else "departed"
        if source < 3:
            frame = frame_of(source, first, records, "event")
            if frame.height:
                self.state.add_events(event_type, frame)
        else:
            self.state.add_requests(frame_of(source, first, records, "request"))
        for kind, time, _ in records:
            if kind == "watermark":
                self.marks[source] = max(self.marks[source], time)
        if self.rng.random() < 0.8:
            watermark = min(self.marks.values())
            self.state.advance(watermark)
            self._check_floor(watermark)
        self._emit()
        if self.rng.random() < 0.2:
            self.evicted += self.state.evict()

    def _emit(self) -> None:
        aligner = self.state.aligner
        if not self.hold and aligner._held is not None:
            by_time = aligner._held.sort("as_of_us", "position")
            aligner._held, ready = None, by_time
        else:
            found = self.state.ready()
            if found is None:
                return
            ready = found
        self.emitted += ready.select("source", "position", "vector").rows()

    def _check_floor(self, watermark: int) -> None:
        """No request at or above the outgoing watermark's promise is still to come out."""
        floor = self.state.unemitted_floor_us()
        frames = [self.state.aligner._waiting, self.state.aligner._held]
        for frame in frames:
            if frame is not None:
                assert floor is not None
                assert frame["occurred_at_us"].to_numpy().min() >= min(watermark, floor)

    def _snapshot(self) -> bytes:
        if self.save_buffers:
            return self.state.snapshot()
        stripped = PartitionState(VIEWS, slice_us=SLICE * MS)
        stripped.restore(self.state.snapshot())
        stripped.aligner._waiting = stripped.aligner._held = None
        stripped.aligner._pending = {name: [] for name in stripped.store.views}
        return stripped.snapshot()

    def _sink(self) -> dict[tuple[int, int], bytes]:
        marks: dict[int, int] = {}
        got = {}
        for source, position, vector in self.emitted:
            if position > marks.get(source, -1):
                marks[source] = position
                got[source, position] = vector
        return got


def outcome(seed: int, **arms: Any) -> bool:
    world = World(random.Random(seed))
    return Worker(world, random.Random(seed + 1), **arms).run() == world.answers()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_replay_is_a_pure_function_of_its_input(seed: int) -> None:
    assert outcome(seed)


@pytest.mark.parametrize("arm", [{"hold": False}, {"save_buffers": False}], ids=str)
def test_without_its_protections_replay_loses_requests_or_events(arm: dict[str, bool]) -> None:
    """Control: emitting by event time, and leaving the buffers out of the checkpoint."""
    assert sum(outcome(seed, **arm) for seed in range(10)) <= 2


def partition(**settings: Any) -> PartitionState:
    state = PartitionState(VIEWS, slice_us=SLICE * MS, **settings)
    for signature, names in SIGNATURES.items():
        state.declare(signature, names)
    return state


def departures(*times_ms: int, first: int = 0, delay: float | None = 4.0) -> pl.DataFrame:
    left = None if delay is None else 10 + delay
    columns = {
        "tenant_id": "t1", "carrier": "AA", "origin": "JFK",
        "left_at": left, "due_at": 10.0, "cancelled": 0.0,
    }  # fmt: skip
    records: list[Record] = [
        ("event", t * MS, {**columns, "occurred_at_us": t * MS}) for t in times_ms
    ]
    return frame_of(0, first, records, "event")


def requests(*times_ms: int, first: int = 0, mode: str = "replay") -> pl.DataFrame:
    columns = {
        "tenant_id": "t1", "carrier": "AA", "origin": "JFK",
        "mode": mode, "signature": "both", "payload": b"p",
    }  # fmt: skip
    records: list[Record] = [
        ("request", t * MS, {**columns, "occurred_at_us": t * MS}) for t in times_ms
    ]
    return frame_of(3, first, records, "request")


def counts(frame: pl.DataFrame | None) -> list[tuple[int, float]]:
    """(position, departures.count_40ms) of each emitted request."""
    assert frame is not None
    place = SIGNATURES["both"].index("departures.count_40ms")
    vectors = [np.frombuffer(v, "<f4") for v in frame["vector"]]
    return [(p, float(v[place])) for p, v in zip(frame["position"], vectors, strict=True)]


def test_a_request_is_answered_when_the_watermark_reaches_its_slice_and_not_before() -> None:
    state = partition()
    state.add_events("departed", departures(18, 19, 21))
    state.add_requests(requests(25))
    assert state.advance(19_999).answered == 0
    assert state.ready() is None
    assert state.unemitted_floor_us() == 25_000
    done = state.advance(20_000)
    assert (done.answered, done.applied) == (1, 2)
    assert counts(state.ready()) == [(0, 2.0)]
    assert state.unemitted_floor_us() is None
    state.add_requests(requests(29, first=1))  # the same slice, after it was answered once
    state.advance(20_000)
    assert counts(state.ready()) == [(1, 2.0)]


def test_answers_wait_for_earlier_positions_of_their_source_only() -> None:
    state = partition()
    state.add_requests(requests(55, 5, 12))
    other = requests(5).with_columns(pl.lit(4, pl.Int32).alias("source"))
    state.add_requests(other)
    state.advance(10_000)
    ready = state.ready()
    assert ready is not None
    assert ready.select("source", "position").rows() == [(4, 0)]
    assert state.unemitted_floor_us() == 5_000
    state.advance(50_000)
    assert [position for position, _ in counts(state.ready())] == [0, 1, 2]


def test_a_live_request_sees_buffered_events_up_to_its_time_but_waits_its_turn() -> None:
    state = partition()
    state.add_events("departed", departures(18, 25, 26))
    state.add_requests(requests(30))
    state.add_requests(requests(25, first=1, mode="live"))
    assert state.ready() is None
    state.advance(30_000)
    assert counts(state.ready()) == [(0, 3.0), (1, 2.0)]
    state.add_requests(requests(31, first=2, mode="live"))
    assert counts(state.ready()) == [(2, 3.0)]


def test_on_arrival_events_are_applied_at_once_and_replay_is_refused() -> None:
    state = partition(apply_on="arrival")
    state.add_events("departed", departures(18, 25))
    state.add_requests(requests(26, mode="live"))
    assert counts(state.ready()) == [(0, 2.0)]
    assert state.advance(0).applied == 2
    with pytest.raises(Poison) as refused:
        state.add_requests(requests(26, 27))
    assert set(refused.value.rows) == {0, 1}


def test_late_arrivals_are_counted() -> None:
    state = partition()
    state.advance(100_000)
    state.add_events("departed", departures(99, 45, 30, 100))
    state.add_requests(requests(95, 100))
    done = state.advance(100_000)
    assert (done.late_events, done.dropped_events, done.late_requests) == (3, 2, 1)
    assert (done.applied, done.touched) == (0, {})
    done = state.advance(110_000)
    assert (done.late_events, done.applied) == (0, 2)
    assert done.touched["departures@v1"].size == 1


@pytest.mark.parametrize("restarted", [False, True])
def test_a_late_event_counts_from_the_next_slice_on_for_whoever_asks(restarted: bool) -> None:
    """Whether a request as of what had been applied was answered before it came or is after; a live
    one sees it at once."""
    state = partition()
    state.advance(20_000)
    state.add_requests(requests(25))
    state.advance(20_000)
    state.add_events("departed", departures(18))
    if restarted:
        saved, state = state.snapshot(), partition()
        state.restore(saved)
    state.add_requests(requests(25, 26, first=1, mode="live"))
    state.add_requests(requests(26, 31, first=3))
    state.advance(20_000)
    state.add_requests(requests(27, first=5))
    state.advance(30_000)
    counted = counts(state.ready())
    assert [one for one in counted if one[0]] == [(1, 1.0), (2, 1.0), (3, 0.0), (4, 1.0), (5, 0.0)]


def test_a_past_s_own_events_behind_what_was_applied_do_not_wait() -> None:
    """Nobody was answered without them."""
    state = partition()
    state.advance(20_000)
    (view, _) = VIEWS
    ahead = state.store.read("departed", departures(18, 25))[view.id]
    state.take_over(view.id, ViewState(view), ahead)
    state.add_requests(requests(25, 31))
    state.advance(30_000)
    assert counts(state.ready()) == [(0, 1.0), (1, 2.0)]


def test_late_events_that_wait_are_in_what_changed() -> None:
    """Late and then nothing applied, applied and then late, and late and then applied."""
    state = partition()
    state.advance(20_000)
    state.track()
    saved = [state.piece(name)() for name in state.pieces()]
    for step in (
        lambda: state.add_events("departed", departures(18)),
        lambda: (state.advance(30_000), state.add_events("departed", departures(25, first=1))),
        lambda: (
            state.add_events("departed", departures(28, first=2)),
            state.advance(40_000),
            state.add_events("departed", departures(39, first=3)),
        ),
    ):
        step()
        saved.append(state.changes()())
    restored = partition()
    for part in saved:
        restored.apply_part(part)
    assert restored.settle() == []
    found = []
    for one in (state, restored):
        one.add_requests(requests(45, 55))
        one.advance(50_000)
        found.append(counts(one.ready()))
    assert found[0] == found[1] == [(0, 3.0), (1, 4.0)]


def test_poison_is_raised_before_anything_is_kept() -> None:
    state = partition()
    good, bad = departures(1), departures(2, delay=float("inf"))
    with pytest.raises(Poison) as refused:
        state.add_events("departed", pl.concat([good, bad]))
    assert set(refused.value.rows) == {1}
    mixed = pl.concat([requests(15), requests(15).with_columns(signature=pl.lit("other"))])
    with pytest.raises(Poison) as refused:
        state.add_requests(mixed)
    assert "'other' is not declared" in refused.value.rows[1]
    assert state.advance(FOREVER).applied == 0
    assert state.ready() is None


def test_declarations_and_snapshots_must_agree() -> None:
    state = partition()
    state.declare("few", SIGNATURES["few"])
    with pytest.raises(Misdeclared, match="already declared"):
        state.declare("few", SIGNATURES["both"])
    with pytest.raises(Misdeclared, match=r"weather\.wind"):
        state.declare("windy", ["weather.wind"])
    with pytest.raises(Misdeclared, match="slice_us"):
        PartitionState(VIEWS, slice_us=7).restore(state.snapshot())
    with pytest.raises(Misdeclared, match="unknown feature view"):
        state.add_view_events("x", state.store.read("departed", departures(1))["departures@v1"])


def test_a_new_view_is_reported_when_older_state_is_restored() -> None:
    older = PartitionState(VIEWS[:1], slice_us=SLICE * MS)
    older.add_events("departed", departures(1, 15))
    older.advance(10_000)
    state = PartitionState(VIEWS, slice_us=SLICE * MS)
    assert state.restore(older.snapshot()) == ["weather@v1"]
    state.declare("both", SIGNATURES["both"])
    state.add_requests(requests(20))
    assert state.advance(20_000).applied == 1
    assert counts(state.ready()) == [(0, 2.0)]
    assert state.memory_bytes() > 0


def two_versions(*numbers: int) -> PartitionState:
    """Versions of a view that counts departures: over 20 ms, and from version 2 on over 40 ms."""
    body = {"event": "departed", "entity": "origin", "scope": "shared", "tile": "10ms"}
    views = {
        f"busy@v{n}": {**body, "features": {"*": ["count 20ms" if n == 1 else "count 40ms"]}}
        for n in numbers
    }
    if numbers == (1, 1):
        views = {"busy": {**views["busy@v1"], "filter": "cancelled = 0"}, **views}
    return PartitionState(parse_views({"views": views}), slice_us=SLICE * MS)


def test_versions_of_a_view_answer_side_by_side() -> None:
    state = two_versions(1, 2)
    names = ("busy@v1.count_20ms", "busy@v2.count_40ms", "busy.count_20ms")
    state.declare("both", names)
    state.add_events("departed", departures(1, 15, 25))
    state.add_requests(requests(40))
    assert state.advance(40_000).applied == 6  # each version has a state of its own
    ready = state.ready()
    assert ready is not None
    assert np.frombuffer(ready["vector"][0], "<f4").tolist() == [1.0, 3.0, 1.0]
    with pytest.raises(Misdeclared, match=r"busy\.count_40ms"):
        state.declare("newest", ["busy.count_40ms"])  # no version: the lowest


def test_a_name_without_version_never_comes_to_mean_another_version() -> None:
    state = two_versions(1, 2)
    state.declare("pinned", ["busy@v2.count_40ms"])
    retired = two_versions(2)
    retired.restore(state.snapshot())
    state.declare("loose", ["busy.count_20ms"])
    with pytest.raises(Misdeclared, match=r"busy@v1\.count_20ms"):
        two_versions(2).restore(state.snapshot())


def test_one_name_and_version_twice_is_refused() -> None:
    with pytest.raises(DefinitionError, match="'busy@v1' is defined twice"):
        two_versions(1, 1)
    body = {"event": "e", "entity": "k", "version": 2, "features": {"*": ["count 1h"]}}
    with pytest.raises(DefinitionError, match="the name says v3"):
        parse_views({"views": {"busy@v3": body}})


@pytest.mark.parametrize(("lateness", "missed"), [(None, [2]), ("25ms", [2]), ("15ms", [1, 2])])
def test_an_event_behind_the_allowed_lateness_is_handed_back(
    lateness: str | None, missed: list[int]
) -> None:
    """Times 95, 80 and 45 ms at watermark 100 ms; the window of 40 ms reaches back to 60 ms."""
    body = {"event": "departed", "entity": "origin", "scope": "shared", "tile": "10ms"}
    features = {"features": {"*": ["count 40ms"]}}
    late = {} if lateness is None else {"lateness": lateness}
    state = PartitionState(
        parse_views({"views": {"busy": {**body, **features, **late}}}), slice_us=SLICE * MS
    )
    state.declare("busy", ["busy.count_40ms"])
    state.advance(100_000)
    events = state.store.read("departed", departures(95, 80, 45))["busy@v1"]
    behind = state.add_view_events("busy@v1", events)
    assert (behind.rows.tolist(), behind.missed.tolist()) == ([0, 1, 2], missed)
    state.add_requests(requests(100, 110).with_columns(signature=pl.lit("busy")))
    done = state.advance(110_000)
    taken = 3 - len(missed)
    assert (done.late_events, done.dropped_events, done.applied) == (3, len(missed), taken)
    ready = state.ready()
    assert ready is not None
    assert [np.frombuffer(one, "<f4").tolist() for one in ready["vector"]] == [[0.0], [taken]]


def test_latest_takes_any_event_unless_its_lateness_is_bounded() -> None:
    """An old event may still be the newest of its entity."""
    for lateness, missed in (({}, []), ({"lateness": 0}, [0])):
        body = {"event": "observed", "entity": "origin", "features": {"temp": ["latest"]}}
        state = PartitionState(parse_views({"views": {"w": {**body, **lateness}}}))
        state.advance(10**12)
        frame = departures(1).with_columns(temp=pl.lit(4.0))
        events = state.store.read("observed", frame)["w@v1"]
        assert state.add_view_events("w@v1", events).missed.tolist() == missed
        assert len(state.store.views["w@v1"].entities) == 1 - len(missed)  # no row for nothing
