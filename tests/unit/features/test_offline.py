"""The batch engine against the stream engine: same bits, whatever order, lateness, corrections."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.features.domain.definitions import Feature, FeatureView, InputColumn
from services.features.domain.engine import ViewState
from services.features.domain.events import ViewEvents, entity_keys, read_events
from services.features.domain.sketches import MAX_VALUES
from services.features.domain.state import PartitionState
from services.features.domain.vectors import Vectors
from services.features.offline.engine import answers
from services.features.seen import LateEvents, seen
from tests.unit.features import test_corrections, test_engine
from tests.unit.features.reference import Event, frame_of

SLICE = 10
END = 230
KEYS = ["a", "b", "c", "unknown", None]
NAMES = {
    "tenant_id": pl.String,
    "k": pl.String,
    "occurred_at_us": pl.Int64,
    "mode": pl.String,
    "signature": pl.String,
    "source": pl.Int64,
    "position": pl.Int64,
}


def frame_with_ids(view: FeatureView, events: Sequence[Event]) -> pl.DataFrame:
    """Events as the views read them: with event_id and, where one is named, what they correct."""
    frame = frame_of(view, events) if not view.corrects else _plain(events)
    targets = [e.target for e in events]
    return frame.with_columns(
        pl.Series("event_id", [f"e{e.position}" for e in events], dtype=pl.String),
        pl.Series(
            "fixes",
            [None if e.void else t for e, t in zip(events, targets, strict=True)],
            dtype=pl.String,
        ),
        pl.Series(
            "undoes",
            [t if e.void else None for e, t in zip(events, targets, strict=True)],
            dtype=pl.String,
        ),
    )


def _plain(events: Sequence[Event]) -> pl.DataFrame:
    rows = [("t", e.entity, e.occurred_at_us, e.source, e.position, e.inputs[0]) for e in events]
    schema = {
        "tenant_id": pl.String, "k": pl.String, "occurred_at_us": pl.Int64, "source": pl.Int64,
        "position": pl.Int64, "x": pl.Float64,
    }  # fmt: skip
    return pl.DataFrame(rows, schema=schema, orient="row")


@dataclass
class Stream:
    """A partition fed in order of arrival: chunks, watermarks that events may come behind,
    evictions and restarts, all drawn from one seed."""

    view: FeatureView
    events: Sequence[Event]
    rng: random.Random
    late: list[LateEvents] = field(default_factory=list)

    def run(self, requests: pl.DataFrame) -> Vectors:
        """What the stream answers to replay requests, in the order given."""
        self.state = self._fresh()
        waiting = requests.sort("position")
        arrival = sorted(
            self.events, key=lambda e: e.occurred_at_us + self.rng.choice([0, 0, 0, 5, 40, 120])
        )
        answered: list[pl.DataFrame] = []
        while arrival or waiting.height:
            count = self.rng.randint(1, 8)
            chunk, arrival = arrival[:count], arrival[count:]
            self._take(chunk)
            due = waiting.head(self.rng.randint(0, waiting.height))
            # none comes late: its answer would depend on what else came meanwhile
            waiting = waiting.tail(waiting.height - due.height)
            self.state.add_requests(due)
            first = min(waiting["occurred_at_us"].to_list(), default=END)
            upto = max((e.occurred_at_us for e in chunk), default=END)
            self.state.advance(min(first, upto - self.rng.choice([0, 0, 10])))
            self._disturb()
            answered += self._ready()
        self.state.advance(END)
        answered += self._ready()
        vectors = pl.concat(answered).sort("position")["vector"].to_list()
        return np.frombuffer(b"".join(vectors), "<f4").reshape(requests.height, -1)

    def _fresh(self) -> PartitionState:
        state = PartitionState([self.view], slice_us=SLICE)
        state.declare("all", self.view.feature_names)
        return state

    def _take(self, chunk: Sequence[Event]) -> None:
        read = read_events(self.view, frame_with_ids(self.view, chunk))
        until_us = self.state.aligner.applied_until_us
        behind = self.state.add_view_events(self.view.id, read)
        if len(behind):
            assert until_us is not None
            until = np.full(len(behind), until_us)
            self.late.append(LateEvents(read.take(behind.rows), until, pl.Series(behind.taken)))

    def _disturb(self) -> None:
        if self.rng.random() < 0.3:
            self.state.evict()
        if self.rng.random() < 0.2:
            saved, self.state = self.state.snapshot(), self._fresh()
            assert self.state.restore(saved) == []

    def _ready(self) -> list[pl.DataFrame]:
        ready = self.state.ready()
        return [] if ready is None else [ready.select("position", "vector")]


def requests_at(times: Sequence[int]) -> pl.DataFrame:
    rows = [
        ("t", KEYS[n % len(KEYS)], at, "replay", "all", 9, n) for n, at in enumerate(sorted(times))
    ]
    return pl.DataFrame(rows, schema=NAMES, orient="row")


@dataclass(frozen=True)
class Compared:
    """The vectors of both engines, and how many events came late and were taken."""

    streamed: Vectors
    batch: Vectors
    taken_late: int

    @property
    def equal(self) -> bool:
        return self.streamed.tobytes() == self.batch.tobytes()


def joined(view: FeatureView, parts: Sequence[LateEvents]) -> LateEvents:
    return LateEvents(
        ViewEvents.concatenate([ViewEvents.none(view), *(one.events for one in parts)]),
        np.concatenate([np.empty(0, np.int64), *(one.applied_until_us for one in parts)]),
        pl.concat([pl.Series([], dtype=pl.Boolean), *(one.taken for one in parts)]),
    )


def only(late: LateEvents, chosen: np.ndarray) -> LateEvents:
    at = np.flatnonzero(chosen)
    return LateEvents(late.events.take(at), late.applied_until_us[at], late.taken[at])


def compare(
    view: FeatureView,
    events: Sequence[Event],
    times: Sequence[int],
    seed: int,
    *,
    later_us: int = 0,
    told: Sequence[bool] = (True, False),
) -> Compared:
    """`later_us` and `told`, which records of late events are looked at (taken or not), are the
    control arms."""
    requests, stream = requests_at(times), Stream(view, events, random.Random(seed))
    streamed = stream.run(requests)
    as_of_us = requests["occurred_at_us"].to_numpy() // SLICE * SLICE
    shuffled = random.Random(seed + 1).sample(list(events), len(events))
    late = joined(view, stream.late)
    known = only(late, late.taken.is_in(list(told)).to_numpy())
    every = read_events(view, frame_with_ids(view, shuffled))
    found = seen(view, every, known)
    keys = entity_keys(requests, view, view.request_entity)
    batch = answers(view, found.events, keys, as_of_us + later_us, found.since_us)
    return Compared(streamed, batch, int(late.taken.sum()))


times = st.lists(st.integers(-20, 220), min_size=1, max_size=25)
views = st.builds(
    lambda retention, lateness, wide: replace(
        test_engine.make_view(retention, wide), lateness_us=lateness
    ),
    st.sampled_from([None, 35, 80]),
    st.sampled_from([None, 0, 25]),
    st.booleans(),
)


@settings(max_examples=50, deadline=None)
@given(
    events=test_engine.event_lists(),
    times=times,
    view=views,
    seed=st.integers(0, 2**16),
)
def test_the_batch_engine_gives_the_bits_of_the_stream(
    events: list[Event], times: list[int], view: FeatureView, seed: int
) -> None:
    found = compare(view, events, times, seed)
    assert found.equal
    if view.lateness_us == 0:  # whatever came late was missed
        assert not found.taken_late


@settings(max_examples=50, deadline=None)
@given(
    events=test_corrections.event_lists(),
    times=times,
    lateness=st.sampled_from([None, 0, 25]),
    seed=st.integers(0, 2**16),
)
def test_corrections_are_seen_from_their_own_time_on(
    events: list[Event], times: list[int], lateness: int | None, seed: int
) -> None:
    view = replace(test_corrections.VIEW, lateness_us=lateness)
    assert compare(view, events, times, seed).equal


def drawn(seed: int) -> tuple[list[Event], list[int]]:
    rng = random.Random(seed)
    events = [
        Event(rng.choice("ab"), rng.randint(0, 170), 0, n, (float(rng.randint(-9, 9)), None))
        for n in range(40)
    ]
    return events, [rng.randint(0, 220) for _ in range(25)]


@pytest.mark.parametrize(
    ("lateness", "arm"),
    [
        (0, {"later_us": 1}),
        (0, {"told": [True]}),
        (25, {"told": [True]}),
        (None, {"told": [False]}),
    ],
    ids=str,
)
def test_without_its_rules_the_batch_engine_differs(
    lateness: int | None, arm: dict[str, Any]
) -> None:
    """Control: as of one microsecond later; with the events that came too late; with those that
    were taken late as if they had been there in time."""
    view = replace(test_engine.make_view(wide=True), lateness_us=lateness)
    assert all(compare(view, *drawn(seed), seed).equal for seed in range(5))
    assert sum(compare(view, *drawn(seed), seed, **arm).equal for seed in range(5)) <= 1


def fixed(seed: int) -> tuple[list[Event], list[int]]:
    """Events of which every third one corrects or retracts an earlier one."""
    events, times = drawn(seed)
    rng = random.Random(seed)
    for n in range(2, len(events), 3):
        target = rng.randrange(n)
        of = events[target]
        events[n] = replace(events[n], entity=of.entity, target=f"e{target}", void=n % 2 == 0)
    return [replace(one, inputs=one.inputs[:1]) for one in events], times


@pytest.mark.parametrize("lateness", [None, 25])
def test_corrections_of_late_events_and_late_corrections_count_since_they_came(
    lateness: int | None,
) -> None:
    """Control: by their own times alone the answers differ."""
    view = replace(test_corrections.VIEW, lateness_us=lateness)
    whole = [compare(view, *fixed(seed), seed) for seed in range(5)]
    assert all(one.equal for one in whole)
    assert all(one.taken_late > 2 for one in whole)
    assert sum(compare(view, *fixed(seed), seed, told=[False]).equal for seed in range(5)) <= 1


def test_corrections_are_looked_at_by_their_time() -> None:
    """Control: what is corrected at any time is not simply gone."""
    events = [
        Event("a", 5, 0, 0, (1.0,)),
        Event("a", 45, 0, 1, (2.0,), "e0", True),
    ]
    view = replace(test_corrections.VIEW, lateness_us=0)
    found = compare(view, events, [5, 10, 11, 25, 45, 50, 60], 1)
    assert found.equal
    ids = [one.name for one in view.features]
    latest = answers(
        view,
        read_events(view, frame_with_ids(view, events)),
        pl.Series(["a"] * 3),
        np.array([45, 46, 5]),
    )[:, ids.index("latest")]
    np.testing.assert_array_equal(latest, np.array([1.0, np.nan, np.nan], np.float32))


def test_of_equal_events_as_many_are_left_out_as_were_missed() -> None:
    view = test_engine.make_view()
    twins = [Event("a", 5, 0, n, (1.0, None)) for n in range(4)]
    events = read_events(view, frame_of(view, [*twins, Event("b", 5, 0, 4, (1.0, None))]))
    late = LateEvents(
        events.take(np.array([2, 0, 3])), np.array([20, 30, 40]), pl.Series([False, True, False])
    )
    kept = seen(view, events, late)
    assert sorted(zip(kept.events.entity, kept.since_us.tolist(), strict=True)) == [
        ("a", 5),
        ("a", 30),
        ("b", 5),
    ]
    assert len(seen(view, events, joined(view, []))) == 5


def test_a_crowded_tile_says_nothing_in_either_engine() -> None:
    view = FeatureView(
        name="v", event_type="e", entity=("k",), scope="shared", tile_us=10, resolution=1.0,
        features=(
            Feature("top", "top", "x", 30, parameter=1),
            Feature("share", "share", "x", 10, parameter=2),
            Feature("distinct", "distinct", "x", 30),
        ),
        columns=(InputColumn("x", "x"),),
    )  # fmt: skip
    events = [Event("a", 5, 0, n, (float(n),)) for n in range(MAX_VALUES + 1)]
    events += [Event("a", 25, 0, 5000 + n, (7.0,)) for n in range(3)]
    read, as_of_us = read_events(view, frame_of(view, events)), np.array([5, 6, 10, 20, 30, 40, 50])
    entities = pl.Series(["a"] * len(as_of_us))
    batch = answers(view, read, entities, as_of_us)
    streamed = ViewState(view).answer_chunk(read, entities, as_of_us)
    assert batch.tobytes() == streamed.tobytes()
    np.testing.assert_array_equal(
        batch[:, 0], np.array([np.nan, np.nan, np.nan, np.nan, np.nan, 7.0, 7.0], np.float32)
    )


def test_no_events_and_no_requests_are_fine() -> None:
    for view in (test_engine.make_view(wide=True), test_corrections.VIEW):
        none = read_events(view, frame_with_ids(view, []))
        asked = answers(view, none, pl.Series(["a", None]), np.array([10, 20]))
        assert asked.shape == (2, len(view.features))
        empty = answers(view, none, pl.Series([], dtype=pl.String), np.array([], np.int64))
        assert empty.shape == (0, len(view.features))
