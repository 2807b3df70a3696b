"""What agents tells the mesh: the events about a run's newest step."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy.ext.asyncio import AsyncConnection

from causemesh.outbox import Event, add_events
from services.agents.domain.review import review_of
from services.agents.domain.runs import Run, result_json

RUNS = "agents.runs.v1"
REVIEWS = "agents.reviews.v1"


async def announce(transaction: AsyncConnection, runs: Sequence[Run]) -> None:
    """Add the events about the newest step of each run, in order, to the outbox.

    All events of a run go through the shard of its prediction's partition, so that they arrive in
    the order of its steps; and shards are taken in order, so that two callers can't deadlock.
    """
    for shard in sorted({run.origin[1] for run in runs}):
        events = [event for run in runs if run.origin[1] == shard for event in _events(run)]
        await add_events(transaction, events, shard=shard)


def _events(run: Run) -> list[Event]:
    """RunStepped and ReviewRecorded; the prediction that led to the run is their origin."""
    step, review = run.newest, review_of(run)
    common = {
        "tenant_id": run.tenant_id,
        "occurred_at": step.occurred_us,
        "run_id": run.run_id,
        "request_id": run.request_id,
    }
    stepped = {
        **common,
        "workflow": run.workflow,
        "step": step.name,
        "number": step.number,
        "result": result_json(step.result),
    }
    recorded = {
        **common,
        "review_id": review.review_id,
        "model": review.model,
        "score": review.score,
        "status": review.status,
        "decision": review.decision,
        "decided_by": review.decided_by,
        "due_at": review.due_us,
    }
    return [
        Event(RUNS, run.run_id, stepped, run.origin),
        Event(REVIEWS, run.run_id, recorded, run.origin),
    ]
