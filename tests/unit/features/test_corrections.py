"""Corrected and retracted events: the same bits as if those that count were all there ever were."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.features.domain.corrections import KeptEvents
from services.features.domain.definitions import Feature, FeatureView, InputColumn
from services.features.domain.engine import ViewState
from services.features.domain.events import ViewEvents, read_events
from services.features.domain.failures import DefinitionError
from services.features.domain.parsing import parse_views
from services.features.domain.vectors import Vectors
from tests.unit.features.reference import Event, expected

TILE = 10
ASKED = ["a", "b", "unknown", None]
VIEW = FeatureView(
    name="v",
    event_type="e",
    entity=("k",),
    scope="shared",
    features=(
        Feature("n", "count", None, 3 * TILE),
        Feature("visit", "count", None, 5 * TILE, "session", TILE),
        Feature("sum", "sum", "x", 3 * TILE),
        Feature("min", "min", "x", 3 * TILE),
        Feature("first", "first", "x", 5 * TILE),
        Feature("latest", "latest", "x"),
        Feature("age", "age"),
        Feature("median", "quantile", "x", 3 * TILE, parameter=0.5),
        Feature("distinct", "distinct", "x", 3 * TILE),
    ),
    columns=(InputColumn("x", "x"),),
    tile_us=TILE,
    retention_us=60,
    corrects="fixes",
    retracts="undoes",
    resolution=0.5,
)


def read(events: Sequence[Event]) -> ViewEvents:
    names = {
        "tenant_id": pl.String, "k": pl.String, "occurred_at_us": pl.Int64, "source": pl.Int64,
        "position": pl.Int64, "event_id": pl.String, "x": pl.Float64, "fixes": pl.String,
        "undoes": pl.String,
    }  # fmt: skip
    rows = [
        (
            "t", e.entity, e.occurred_at_us, e.source, e.position, f"e{e.position}", e.inputs[0],
            None if e.void else e.target, e.target if e.void else None,
        )
        for e in events
    ]  # fmt: skip
    return read_events(VIEW, pl.DataFrame(rows, schema=names, orient="row"))


def reference(events: Sequence[Event], as_of: Sequence[int]) -> Vectors:
    entities = asked(len(as_of))
    rows = [expected(VIEW, events, e, t) for e, t in zip(entities, as_of, strict=True)]
    return np.array(rows, np.float32).reshape(len(as_of), len(VIEW.features))


def asked(count: int) -> list[str | None]:
    return [ASKED[i % len(ASKED)] for i in range(count)]


@st.composite
def event_lists(draw: st.DrawFn) -> list[Event]:
    count = draw(st.integers(0, 25))
    events = []
    for position in range(count):
        target = draw(st.none() | st.integers(0, 26).map(lambda n: f"e{n}"))
        events.append(
            Event(
                draw(st.sampled_from(["a", "b", None])),
                draw(st.integers(0, 120)),
                0,
                position,
                (draw(st.none() | st.integers(-9, 9).map(float)),),
                target,
                target is not None and draw(st.booleans()),
            )
        )
    return events


def run(events: list[Event], cuts: list[int], seed: int) -> bool:
    """Whether answers, in chunks and from the state, are the reference's bits throughout."""
    rng, state, applied = random.Random(seed), ViewState(VIEW), -10
    same = True
    for cut in [*sorted(cuts), 130]:
        due = [e for e in events if applied <= e.occurred_at_us < cut]
        rng.shuffle(due)
        as_of = np.array([rng.randint(applied, cut) for _ in range(8)], np.int64)
        got = state.answer_chunk(read(due), asked(8), as_of)
        same &= got.tobytes() == reference(events, as_of.tolist()).tobytes()
        half = rng.randint(0, len(due))
        for part in (due[:half], due[half:]):
            state.apply(read(part))
        state.apply(read([]), until_us=cut)
        if rng.random() < 0.3:
            fresh = ViewState(VIEW)
            fresh.restore(state.snapshot())
            state = fresh
        if rng.random() < 0.3:
            state.evict(cut)
        applied = cut
        at_cut = np.full(4, cut, np.int64)
        got = state.answer(asked(4), at_cut)
        same &= got.tobytes() == reference(events, at_cut.tolist()).tobytes()
    return same


@settings(max_examples=60, deadline=None)
@given(event_lists(), st.lists(st.integers(0, 130), max_size=5), st.integers(0, 2**16))
def test_corrections_in_any_order_give_the_reference_bits(
    events: list[Event], cuts: list[int], seed: int
) -> None:
    assert run(events, cuts, seed)


def test_without_what_is_kept_a_correction_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control."""
    pair = [Event("a", 5, 0, 0, (1.0,)), Event("a", 15, 0, 1, (2.0,), "e0", True)]
    assert run(pair, [10, 20], 1)
    monkeypatch.setattr(KeptEvents, "corrected_rows", lambda _, more: more.rows[:0])
    assert not run(pair, [10, 20], 1)


def test_a_correction_outlives_the_time_it_occurred_at() -> None:
    """It left the windows before its event did; what makes the entity anew must still know it."""
    plain = [Event("a", 0, 0, n, (None,)) for n in range(8)]
    pair = [Event("a", 11, 0, 8, (0.0,)), Event("a", 0, 0, 9, (None,), "e8")]
    assert run([*plain, *pair, Event("a", 68, 0, 10, (None,), "e10")], [0, 68], 0)


def test_what_no_answer_sees_is_kept_no_longer() -> None:
    state, most = ViewState(VIEW), 0
    for step in range(100):
        events = [Event("a", step * 10 + n, 0, step * 10 + n, (1.0,)) for n in range(10)]
        state.apply(read(events), step * 10 + 10)
        assert state._kept_events is not None
        most = max(most, len(state._kept_events.events))
    assert most <= 2 * 70


def test_a_view_that_would_have_to_keep_events_for_ever_is_refused() -> None:
    body = {"event": "e", "entity": "k", "retracts": "undoes", "features": {"x": ["latest"]}}
    with pytest.raises(DefinitionError, match="need a retention"):
        parse_views({"views": {"v": body}})
    assert parse_views({"views": {"v": {**body, "retention": "1d"}}})


def test_a_view_made_again_from_its_own_parts_is_the_same() -> None:
    assert replace(VIEW) == VIEW
    assert replace(VIEW, entities=7).fingerprint == VIEW.fingerprint
