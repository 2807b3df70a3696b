"""The run engine: one history for one list of signals, whatever happens in between."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from causemesh.errors import Fatal
from services.agents.domain.review import STATUSES, ReviewWorkflow, review_of
from services.agents.domain.runs import (
    Move,
    Refused,
    Run,
    Signal,
    Step,
    Workflow,
    advance,
    result_json,
    stable_id,
    started,
)

REVIEW = ReviewWorkflow("m", 0.4, 0.6, 60_000_000, "keep")
PREDICTED = Signal("predicted", 1_000, {"model": "m", "version": 2, "score": 0.5})
ENDS = ("approve", "reject", "time_out")
ended = st.builds(
    Signal,
    st.sampled_from(ENDS),
    st.integers(0, 10**15),
    st.fixed_dictionaries({"decision": st.text(), "decided_by": st.text(), "comment": st.none()}),
)


class Forgetful(ReviewWorkflow):
    """Answers by the signal alone, as if there were no history."""

    def next_move(self, run: Run, signal: Signal) -> Move | None:
        return super().next_move(replace(run, history=run.history[:1]), signal)


def opened(workflow: Workflow = REVIEW) -> Run:
    return started(workflow, "t", "r", ("p", 0, 7), PREDICTED)


def told(workflow: Workflow, signals: list[Signal], *, stored: bool = False) -> Run:
    """The run after all signals; `stored` writes and reads the history before each."""
    run = opened(workflow)
    for signal in signals:
        if stored:
            run = replace(run, history=tuple(through_json(step) for step in run.history))
        try:
            run = advance(workflow, run, signal)
        except Refused:
            continue
    return run


def through_json(step: Step) -> Step:
    return replace(step, result=json.loads(result_json(step.result)))


def ends_of(run: Run) -> list[str]:
    return [step.name for step in run.history if step.name != "opened"]


@given(st.lists(ended, min_size=1, max_size=6))
def test_a_run_ends_once_by_the_first_signal(signals: list[Signal]) -> None:
    run = told(REVIEW, signals)
    first = {"approve": "approved", "reject": "rejected", "time_out": "timed_out"}
    assert ends_of(run) == [first[signals[0].name]]
    assert run.newest.occurred_us == signals[0].occurred_us
    assert told(REVIEW, signals, stored=True) == run


def test_without_the_history_a_run_ends_twice() -> None:
    signals = [Signal("approve", 2, {}), Signal("reject", 3, {})]
    forgetful = Forgetful("m", 0.4, 0.6, 60_000_000, "keep")
    assert ends_of(told(forgetful, signals)) == ["approved", "rejected"]


def test_the_same_signal_again_changes_nothing() -> None:
    once = advance(REVIEW, opened(), Signal("approve", 5, {"decided_by": "ann"}))
    again = advance(REVIEW, once, Signal("approve", 9, {"decided_by": "bob"}))
    assert again is once


@pytest.mark.parametrize("name", ["predicted", "unheard_of"])
def test_a_signal_out_of_place_is_refused(name: str) -> None:
    with pytest.raises(Refused, match="opened already"):
        advance(REVIEW, opened(), Signal(name, 5, {}))
    with pytest.raises(Refused, match="starts with a prediction"):
        started(REVIEW, "t", "r", ("p", 0, 7), Signal("approve", 5, {}))


def test_a_history_with_a_gap_stops_the_service() -> None:
    run = opened()
    gap = replace(run, history=(replace(run.newest, number=1),))
    with pytest.raises(Fatal, match=r"steps \[1\]"):
        advance(REVIEW, gap, Signal("approve", 5, {}))


def test_a_run_ends_by_the_rules_it_was_opened_under() -> None:
    changed = ReviewWorkflow("m", 0.4, 0.6, 1, "drop")
    run = advance(changed, opened(), Signal("time_out", 60_001_000, {}))
    review = review_of(run)
    assert (review.decision, review.due_us) == ("keep", 60_001_000)
    assert (review.status, review.decided_us) == ("timed_out", 60_001_000)
    assert review.status in STATUSES


def test_ids_are_stable_and_keep_names_apart() -> None:
    # Written down: a changed id would open every review of a replayed log once more.
    assert opened().run_id == "618ae87a-3a3b-5961-9f53-b0cf4f0bbd30"
    odd: list[tuple[Any, ...]] = [("run", "a|b", "c"), ("run", "a", "b|c"), ("run", 'a","b', "c")]
    assert len({stable_id(*names) for names in odd}) == 3
    assert review_of(opened()).review_id != opened().run_id
