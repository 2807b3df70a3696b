"""The review workflow: an uncertain prediction waits for a person, and then for nobody.

predicted -> opened -> approved | rejected | timed_out
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import polars as pl

from services.agents.domain.runs import Move, Refused, Run, Signal, stable_id, started

OPENED, APPROVED, REJECTED, TIMED_OUT = "opened", "approved", "rejected", "timed_out"
STATUSES = (OPENED, APPROVED, REJECTED, TIMED_OUT)

PREDICTED, APPROVE, REJECT, TIME_OUT = "predicted", "approve", "reject", "time_out"
_ENDS = {APPROVE: APPROVED, REJECT: REJECTED, TIME_OUT: TIMED_OUT}


@dataclass(frozen=True)
class ReviewWorkflow:
    """Which predictions a person sees, and what holds without an answer.

    Scores from `low` to `high` of `model`, both inclusive, open a review; it is due `timeout_us`
    of event time after the prediction, and then `default_decision` holds.
    """

    name: ClassVar[str] = "review"
    model: str
    low: float
    high: float
    timeout_us: int
    default_decision: str

    def next_move(self, run: Run, signal: Signal) -> Move | None:
        """See `Workflow.next_move`."""
        if not run.history:
            return self._open(run, signal)
        status, wanted = run.newest.name, _ENDS.get(signal.name)
        if status == wanted:
            return None
        if status != OPENED or wanted is None:
            raise Refused(run, signal, f"the review is {status} already")
        if signal.name != TIME_OUT:
            return Move(wanted, signal.content)
        decision = run.history[0].result["default_decision"]
        return Move(wanted, {"decision": decision, "decided_by": None, "comment": None})

    def _open(self, run: Run, signal: Signal) -> Move:
        if signal.name != PREDICTED:
            raise Refused(run, signal, f"a review starts with a prediction, not with {signal.name}")
        # The rules go into the history: a run ends by those it was opened under.
        rules = {
            "due_us": signal.occurred_us + self.timeout_us,
            "default_decision": self.default_decision,
        }
        return Move(OPENED, {**signal.content, **rules})


@dataclass(frozen=True)
class Review:
    """A review as its run's history tells it. Times in microseconds."""

    review_id: str
    run_id: str
    tenant_id: str
    request_id: str
    model: str
    version: int
    score: float
    status: str
    opened_us: int
    due_us: int
    decision: str | None
    decided_by: str | None
    comment: str | None
    decided_us: int | None


def review_of(run: Run) -> Review:
    """The review of a run of this workflow."""
    opened, newest = run.history[0], run.newest
    ended = newest.name != OPENED
    outcome = newest.result if ended else {}
    return Review(
        review_id=stable_id("review", run.workflow, run.tenant_id, run.request_id),
        run_id=run.run_id,
        tenant_id=run.tenant_id,
        request_id=run.request_id,
        model=opened.result["model"],
        version=opened.result["version"],
        score=opened.result["score"],
        status=newest.name,
        opened_us=opened.occurred_us,
        due_us=opened.result["due_us"],
        decision=outcome.get("decision"),
        decided_by=outcome.get("decided_by"),
        comment=outcome.get("comment"),
        decided_us=newest.occurred_us if ended else None,
    )


def opened_runs(
    workflow: ReviewWorkflow,
    frame: pl.DataFrame,
    *,
    topic: str,
    partition: int,
    positions: npt.NDArray[np.int64],
) -> list[Run]:
    """The runs that a batch of predictions opens, in log order, one a request.

    `frame` has the columns of PredictionMade, `positions` int64[rows] where each row lies.
    """
    uncertain = (
        frame.lazy()
        .select("tenant_id", "request_id", "model", "version", "outcome", "score", "occurred_at")
        .with_columns(pl.Series("position", positions), pl.col("occurred_at").to_physical())
        .filter(
            pl.col("outcome") == "predicted",
            pl.col("model") == workflow.model,
            pl.col("score").is_between(workflow.low, workflow.high),
        )
        .unique(["tenant_id", "request_id"], keep="first", maintain_order=True)
        .collect()
    )
    return [
        started(
            workflow,
            row["tenant_id"],
            row["request_id"],
            (topic, partition, row["position"]),
            Signal(
                PREDICTED,
                row["occurred_at"],
                {name: row[name] for name in ("model", "version", "score")},
            ),
        )
        for row in uncertain.iter_rows(named=True)
    ]
