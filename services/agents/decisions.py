"""How reviews end: a person decides, or their time runs out. Whoever locks first wins."""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa
from prometheus_client import Counter
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from causemesh.sql import database_errors
from services.agents.domain.review import TIME_OUT, ReviewWorkflow, review_of
from services.agents.domain.runs import Run, Signal, advance
from services.agents.events import announce
from services.agents.store import RunStore

_TIME_OUTS_LOCK = 0x74696D656F7574  # any number that every instance agrees on
_TIME_OUTS_AT_ONCE = 500


class Decisions:
    """Moves open reviews to their end: the step, the review and the events commit together."""

    def __init__(
        self,
        engine: AsyncEngine,
        store: RunStore,
        workflow: ReviewWorkflow,
        outcomes: Counter | None = None,
    ) -> None:
        self._engine = engine
        self._store = store
        self._workflow = workflow
        self._outcomes = outcomes

    async def decide(self, review_id: str, signal: Signal) -> Run | None:
        """Answer a review; returns its run, None when there is no such review.

        The same decision again changes nothing. Raises Refused when the review ended otherwise,
        Retryable when the database is away.
        """
        async with database_errors(), self._engine.begin() as transaction:
            run = await self._store.of_review(transaction, review_id)
            if run is None:
                return None
            moved = advance(self._workflow, run, signal)
            if moved is not run:
                await self._end(transaction, [moved])
        if moved is not run:
            self._count([moved])
        return moved

    async def time_out(self, watermark_us: int) -> int:
        """End the reviews due at the watermark, in order of their due times; returns how many.

        At most a transaction's worth: call again until 0. Raises Retryable.
        """
        async with database_errors(), self._engine.begin() as transaction:
            lock = sa.select(sa.func.pg_try_advisory_xact_lock(_TIME_OUTS_LOCK))
            if not (await transaction.execute(lock)).scalar_one():
                return 0
            due = await self._store.due(transaction, watermark_us, _TIME_OUTS_AT_ONCE)
            moved = [
                advance(self._workflow, run, Signal(TIME_OUT, review_of(run).due_us, {}))
                for run in due
            ]
            if moved:
                await self._end(transaction, moved)
        self._count(moved)
        return len(moved)

    async def _end(self, transaction: AsyncConnection, moved: Sequence[Run]) -> None:
        await self._store.append(transaction, moved)
        await announce(transaction, moved)

    def _count(self, moved: Sequence[Run]) -> None:
        if self._outcomes is not None:
            for run in moved:
                self._outcomes.labels(run.workflow, run.newest.name).inc()
