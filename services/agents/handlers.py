"""From predictions to open reviews: one batch in, rows and their events in one transaction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prometheus_client import Counter

from causemesh.runner import Batch, Emission
from services.agents.domain.review import OPENED, ReviewWorkflow, opened_runs
from services.agents.events import announce
from services.agents.store import RunStore

PREDICTIONS = "inference.predictions.v1"


class ReviewOpener:
    """The processor of one partition of the predictions."""

    takes_bad_rows = False
    stateful = False

    def __init__(
        self, workflow: ReviewWorkflow, store: RunStore, outcomes: Counter | None = None
    ) -> None:
        self._workflow = workflow
        self._store = store
        self._outcomes = outcomes

    async def process(
        self, batches: Sequence[Batch], watermark_us: int, transaction: Any
    ) -> Emission:
        """Open a review for every uncertain prediction; see `Processor.process`."""
        for batch in batches:
            runs = opened_runs(
                self._workflow,
                batch.frame,
                topic=batch.topic,
                partition=batch.partition,
                positions=batch.positions,
            )
            fresh = await self._store.start(transaction, runs)
            await announce(transaction, fresh)
            if self._outcomes is not None:
                self._outcomes.labels(self._workflow.name, OPENED).inc(len(fresh))
        return Emission()

    def snapshot(self) -> bytes | None:
        """No state beside the database."""
        return None

    def restore(self, state: bytes | None) -> None:
        """No state beside the database."""
