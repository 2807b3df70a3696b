"""Which predictions open a review, decided on columns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from causemesh.errors import Misdeclared
from services.agents.domain.review import ReviewWorkflow, opened_runs, review_of
from services.agents.domain.runs import Run
from services.agents.settings import AgentsSettings, read_review

REVIEW = ReviewWorkflow("late", 0.48, 0.52, 6 * 3_600_000_000, "keep")
Row = tuple[str, str, str, str, float | None]
UNCERTAIN: Row = ("t", "r0", "late", "predicted", 0.5)


def runs_of(rows: list[Row], first: int = 0) -> list[Run]:
    names = ["tenant_id", "request_id", "model", "outcome", "score"]
    kinds = dict.fromkeys(names, pl.String) | {"score": pl.Float64}
    frame = pl.DataFrame(rows, schema=kinds, orient="row").with_columns(
        pl.lit(3, pl.Int32).alias("version"),
        pl.int_range(pl.len()).add(first).cast(pl.Datetime("us", "UTC")).alias("occurred_at"),
    )
    positions = np.arange(first, first + len(rows), dtype=np.int64)
    return opened_runs(REVIEW, frame, topic="p", partition=2, positions=positions)


def test_the_band_is_inclusive() -> None:
    scores = [0.4799, 0.48, 0.5, 0.52, 0.5201, None, float("nan"), float("inf")]
    runs = runs_of([("t", f"r{n}", "late", "predicted", s) for n, s in enumerate(scores)])
    assert [run.request_id for run in runs] == ["r1", "r2", "r3"]


@pytest.mark.parametrize(
    "row", [("t", "r", "other", "predicted", 0.5), ("t", "r", "late", "failed", 0.5)]
)
def test_other_models_and_outcomes_open_nothing(row: Row) -> None:
    assert [run.request_id for run in runs_of([row, UNCERTAIN])] == ["r0"]


def test_a_run_names_its_prediction() -> None:
    (run,) = runs_of([UNCERTAIN], first=41)
    review = review_of(run)
    assert run.origin == ("p", 2, 41)
    assert (review.opened_us, review.due_us) == (41, 41 + 6 * 3_600_000_000)
    assert (review.model, review.version, review.score) == ("late", 3, 0.5)
    assert (review.status, review.decision, review.decided_us) == ("opened", None, None)


def test_one_run_a_request_and_the_first_prediction_wins() -> None:
    runs = runs_of([UNCERTAIN, UNCERTAIN, ("u", "r0", "late", "predicted", 0.5)])
    assert [(run.tenant_id, run.origin[2]) for run in runs] == [("t", 0), ("u", 2)]


@given(st.lists(st.tuples(st.integers(0, 5), st.floats(0.4, 0.6))), st.integers(0, 12))
def test_runs_do_not_depend_on_where_a_batch_ends(pairs: list[tuple[int, float]], cut: int) -> None:
    rows: list[Row] = [("t", f"r{n}", "late", "predicted", score) for n, score in pairs]
    in_two: dict[str, Run] = {}
    for run in [*runs_of(rows[:cut]), *runs_of(rows[cut:], first=len(rows[:cut]))]:
        in_two.setdefault(run.run_id, run)  # as the store does
    assert list(in_two.values()) == runs_of(rows)


def test_the_example_and_the_test_project_can_be_read() -> None:
    root = Path(__file__).parents[3]
    told = AgentsSettings(project=root / "examples" / "flights").review()
    assert told == ReviewWorkflow("late-arrival", 0.48, 0.52, 6 * 3_600_000_000, "keep")
    assert AgentsSettings(project=root / "tests" / "project").review().timeout_us == 180_000_000


GOOD = "{model: m, band: [0.4, 0.6], timeout_hours: 1, default_decision: keep}"


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("", "the file"),
        ("workflows: [", "not YAML"),
        ("workflows: {}", "workflows.review"),
        ("workflows: {vote: {}, review: " + GOOD + "}", "workflows.vote"),
        ("workflows: {review: " + GOOD.replace("[0.4, 0.6]", "[0.6, 0.4]") + "}", "lower score"),
        ("workflows: {review: " + GOOD.replace("[0.4, 0.6]", "[0.4, .nan]") + "}", "band.1"),
        ("workflows: {review: " + GOOD.replace("[0.4, 0.6]", "[0.4]") + "}", "band"),
        ("workflows: {review: " + GOOD.replace("hours: 1", "hours: 0") + "}", "timeout_hours"),
        ("workflows: {review: " + GOOD.replace("keep", "''") + "}", "default_decision"),
    ],
)
def test_a_wrong_file_is_refused_by_name(tmp_path: Path, text: str, wrong: str) -> None:
    path = tmp_path / "agents.yaml"
    path.write_text(text)
    with pytest.raises(Misdeclared, match=wrong):
        read_review(path)
    path.write_text("workflows: {review: " + GOOD + "}")
    assert read_review(path).model == "m"
