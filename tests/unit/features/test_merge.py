"""Two states of a view, merged: the same bits as one that saw everything, wherever it was cut."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.features.domain.definitions import FeatureView
from services.features.domain.engine import ViewState
from services.features.domain.events import ViewEvents
from services.features.domain.sketched import ViewSketches
from services.features.domain.vectors import Vectors
from tests.unit.features import test_corrections as corrected
from tests.unit.features import test_engine as plain
from tests.unit.features.reference import Event, expected

Read = Callable[[Sequence[Event]], ViewEvents]


def reference(view: FeatureView, events: Sequence[Event], as_of: Sequence[int]) -> Vectors:
    entities = plain.cycle(len(as_of))
    rows = [expected(view, events, e, t) for e, t in zip(entities, as_of, strict=True)]
    return np.array(rows, np.float32).reshape(len(as_of), len(view.features))


def run(
    view: FeatureView,
    read: Read,
    events: list[Event],
    *,
    cut: int,
    ends: tuple[int, int],
    seed: int,
) -> tuple[Vectors, Vectors]:
    """What the merged state answers, and the reference.

    The past is what lies up to the cut and is computed up to the first of `ends` in event time;
    the rest ran live meanwhile, up to the second one.
    """
    rng = random.Random(seed)
    first, second = sorted(ends)
    past, live = ViewState(view), ViewState(view)
    old = [e for e in events if e.position <= cut]
    new = [e for e in events if e.position > cut]
    done = [e for e in old if e.occurred_at_us < first]
    rng.shuffle(done)
    middle = rng.randint(0, len(done))
    for part in (done[:middle], done[middle:]):
        past.apply(read(part))
    live.apply(read([]), until_us=first)
    came = [e for e in new if e.occurred_at_us < second]
    rng.shuffle(came)
    live.apply(read(came), until_us=rng.choice([None, second]))
    if rng.random() < 0.3:
        live.evict(second)
    rows = past.merge(live)
    for key, row in zip(live.index.keys, live.index.rows.tolist(), strict=True):
        assert past.index.keys[past.index.rows.tolist().index(rows[row])] == key
    past.apply(read([e for e in old if first <= e.occurred_at_us < second]), until_us=second)
    if rng.random() < 0.3:
        past = plain.restored(past)
    if rng.random() < 0.3:
        past.evict(second)
    as_of = np.array([rng.randint(second, second + 60) for _ in range(15)], np.int64)
    later = [e for e in events if e.occurred_at_us >= second]
    got = past.answer_chunk(read(later), plain.cycle(15), as_of)
    return got, reference(view, events, as_of.tolist())


@settings(max_examples=60, deadline=None)
@given(
    events=plain.event_lists(),
    cut=st.integers(-1, 40),
    ends=st.tuples(st.integers(-30, 180), st.integers(-30, 180)),
    retention=st.sampled_from([None, 35, 80]),
    wide=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_merged_at_any_cut_the_reference_bits(
    *,
    events: list[Event],
    cut: int,
    ends: tuple[int, int],
    retention: int | None,
    wide: bool,
    seed: int,
) -> None:
    view = plain.make_view(retention, wide)
    got, want = run(
        view, lambda some: plain.read(view, some), events, cut=cut, ends=ends, seed=seed
    )
    plain.same_bits(got, want)


@settings(max_examples=60, deadline=None)
@given(
    events=corrected.event_lists(),
    cut=st.integers(-1, 25),
    ends=st.tuples(st.integers(0, 130), st.integers(0, 130)),
    seed=st.integers(0, 2**16),
)
def test_corrections_across_the_cut_give_the_reference_bits(
    events: list[Event], cut: int, ends: tuple[int, int], seed: int
) -> None:
    got, want = run(corrected.VIEW, corrected.read, events, cut=cut, ends=ends, seed=seed)
    plain.same_bits(got, want)


def many() -> list[Event]:
    """An event of each entity every 3 us, in the log's order."""
    return [
        Event(plain.ENTITIES[n % 3], n * 3, 0, n, (float(n % 7), float(n % 5))) for n in range(40)
    ]


def differs(view: FeatureView, cut: int) -> bool:
    got, want = run(
        view, lambda some: plain.read(view, some), many(), cut=cut, ends=(100, 100), seed=1
    )
    return got.tobytes() != want.tobytes()


def test_control_what_is_merged_twice_counts_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    view = plain.make_view()
    assert not differs(view, 20)
    merge = ViewState.merge

    def twice(state: ViewState, other: ViewState) -> object:
        merge(state, other)
        return merge(state, other)

    monkeypatch.setattr(ViewState, "merge", twice)
    assert differs(view, 20)


def test_control_without_the_sketches_cells_an_answer_is_wrong(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    view = plain.make_view(wide=True)
    assert not differs(view, 25)
    monkeypatch.setattr(ViewSketches, "merge", lambda *_: None)
    assert differs(view, 25)


@pytest.mark.parametrize("off", [-1, 1])
def test_control_a_cut_that_is_off_by_one_loses_or_doubles(off: int) -> None:
    view, events = plain.make_view(), many()
    past, live = ViewState(view), ViewState(view)
    past.apply(plain.read(view, [e for e in events if e.position <= 25 + off]))
    live.apply(plain.read(view, [e for e in events if e.position > 25]), until_us=120)
    past.merge(live)
    as_of = np.full(15, 120, np.int64)
    got = past.answer(plain.cycle(15), as_of)
    assert got.tobytes() != reference(view, events, as_of.tolist()).tobytes()
