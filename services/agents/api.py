"""The admin API of agents: the reviews that wait for a person, and the history of runs."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal
from uuid import UUID

from fastapi import APIRouter, Depends, Query
from pydantic import BaseModel, ConfigDict, Field

from causemesh.admin import Page, PageParams, Problem, failures, page_of
from causemesh.clock import Clock
from services.agents.decisions import Decisions
from services.agents.domain.review import APPROVE, REJECT, Review, review_of
from services.agents.domain.runs import Refused, Run, Signal
from services.agents.store import ReviewFilter, RunStore

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_TEXT = r"^[^\x00]*$"  # Postgres has no zero character in text
Status = Literal["opened", "approved", "rejected", "timed_out"]


class DecisionAsk(BaseModel):
    """Who decides, and why."""

    model_config = ConfigDict(extra="forbid")

    decided_by: str = Field(min_length=1, max_length=200, pattern=_TEXT)
    comment: str | None = Field(default=None, max_length=4_000, pattern=_TEXT)

    def signal(self, name: str, now_us: int) -> Signal:
        """The decision as the workflow hears it; a person's act happens when it is made."""
        return Signal(name, now_us, {"decision": name, **self.model_dump()})


class ReviewAnswer(BaseModel):
    """A review; `decided_at` is the due time when it timed out."""

    review_id: str
    run_id: str
    tenant_id: str
    request_id: str
    model: str
    version: int
    score: float
    status: Status
    opened_at: datetime
    due_at: datetime
    decision: str | None
    decided_by: str | None
    comment: str | None
    decided_at: datetime | None


class StepAnswer(BaseModel):
    """One step of a run; `result` as on agents.runs.v1."""

    number: int
    step: str
    occurred_at: datetime
    result: dict[str, Any]


class RunAnswer(BaseModel):
    """A run with its history; `origin` is the record that started it."""

    run_id: str
    workflow: str
    tenant_id: str
    request_id: str
    origin: dict[str, str | int]
    steps: list[StepAnswer]


def routes(store: RunStore, decisions: Decisions, clock: Clock) -> APIRouter:
    """All routes, bound to their connections."""
    api = APIRouter()

    @api.get("/reviews", tags=["reviews"])
    async def list_reviews(
        page: Annotated[PageParams, Depends()],
        status: Status | None = None,
        tenant_id: Annotated[str | None, Query(pattern=_TEXT)] = None,
    ) -> Page[ReviewAnswer]:
        """Reviews, those due first at the top."""
        chosen = ReviewFilter(status, tenant_id)
        found = await store.reviews(chosen, after=_after(page.after), limit=page.limit + 1)
        shown = page_of(found, page.limit, lambda review: [review.due_us, review.review_id])
        answers = [_review_answer(review) for review in shown.items]
        return Page(items=answers, next_cursor=shown.next_cursor)

    @api.get("/reviews/{review_id}", tags=["reviews"], responses=failures(404))
    async def get_review(review_id: UUID) -> ReviewAnswer:
        """One review."""
        review = await store.review(str(review_id))
        if review is None:
            raise _no_review(review_id)
        return _review_answer(review)

    @api.post("/reviews/{review_id}/approve", tags=["reviews"], responses=failures(404, 409))
    async def approve_review(review_id: UUID, ask: DecisionAsk) -> ReviewAnswer:
        """Let the prediction stand; the same again is answered alike, otherwise 409."""
        return await _decided(decisions, review_id, ask.signal(APPROVE, clock.now_us()))

    @api.post("/reviews/{review_id}/reject", tags=["reviews"], responses=failures(404, 409))
    async def reject_review(review_id: UUID, ask: DecisionAsk) -> ReviewAnswer:
        """Refuse the prediction; the same again is answered alike, otherwise 409."""
        return await _decided(decisions, review_id, ask.signal(REJECT, clock.now_us()))

    @api.get("/runs/{run_id}", tags=["runs"], responses=failures(404))
    async def get_run(run_id: UUID) -> RunAnswer:
        """One run with its steps."""
        run = await store.run(str(run_id))
        if run is None:
            raise Problem(404, "not_found", f"there is no run {run_id}")
        return _run_answer(run)

    return api


async def _decided(decisions: Decisions, review_id: UUID, signal: Signal) -> ReviewAnswer:
    try:
        run = await decisions.decide(str(review_id), signal)
    except Refused as refused:
        told = _review_answer(review_of(refused.run)).model_dump(mode="json")
        raise Problem(409, "already_decided", str(refused), review=told) from refused
    if run is None:
        raise _no_review(review_id)
    return _review_answer(review_of(run))


def _after(key: Any) -> tuple[int, str] | None:
    match key:
        case None:
            return None
        case [int(due_us), str(review_id)]:
            return due_us, review_id
    raise Problem(422, "invalid_cursor", "use next_cursor of the page before")


def _no_review(review_id: UUID) -> Problem:
    return Problem(404, "not_found", f"there is no review {review_id}")


def _instant(at_us: int) -> datetime:
    return _EPOCH + timedelta(microseconds=at_us)


def _review_answer(review: Review) -> ReviewAnswer:
    row = asdict(review)
    for name in ("opened", "due", "decided"):
        at_us = row.pop(f"{name}_us")
        row[f"{name}_at"] = None if at_us is None else _instant(at_us)
    return ReviewAnswer(**row)


def _run_answer(run: Run) -> RunAnswer:
    steps = [
        StepAnswer(
            number=step.number,
            step=step.name,
            occurred_at=_instant(step.occurred_us),
            result=dict(step.result),
        )
        for step in run.history
    ]
    return RunAnswer(
        run_id=run.run_id,
        workflow=run.workflow,
        tenant_id=run.tenant_id,
        request_id=run.request_id,
        origin=dict(zip(("topic", "partition", "position"), run.origin, strict=True)),
        steps=steps,
    )
