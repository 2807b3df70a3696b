"""From task batches to outcomes: one batched model call for many requests."""

from __future__ import annotations

import asyncio
from collections import Counter as Tally
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from prometheus_client import Counter

from causemesh.clock import Clock
from causemesh.runner import Batch, Emission, Outgoing
from causemesh.spans import calling
from services.inference.deployments import Deployments
from services.inference.domain import ModelVersion, Outcomes, groups, matrix
from services.inference.gateways import ModelError, ModelServer, NotLoaded

PREDICTIONS = "inference.predictions.v1"
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Work:
    """A batch of tasks, the vectors in it, and what becomes of them."""

    batch: Batch
    made: Outcomes
    vectors: Sequence[bytes]


class Predict:
    """The processor of one lane's tasks."""

    takes_bad_rows = False
    stateful = False

    def __init__(
        self,
        lane: str,
        deployments: Deployments,
        server: ModelServer,
        clock: Clock,
        *,
        max_batch: int,
        calls_in_flight: int,
        outcomes: Counter | None = None,
    ) -> None:
        self._lane = lane
        self._deployments = deployments
        self._server = server
        self._clock = clock
        self._max_batch = max_batch
        self._calls = asyncio.Semaphore(calls_in_flight)
        self._outcomes = outcomes

    async def process(
        self, batches: Sequence[Batch], watermark_us: int, transaction: Any
    ) -> Emission:
        """See `Processor.process`."""
        return Emission([await self._one(batch) for batch in batches])

    async def _one(self, batch: Batch) -> Outgoing:
        tasks = batch.frame
        made = Outcomes.of(tasks, self._clock.now_us())
        work = _Work(batch, made, tasks["vector"].to_list())
        calls = [
            self._call(work, model, version, rows)
            for model, version, rows in groups(tasks, np.flatnonzero(made.open), self._max_batch)
        ]
        if len(calls) == 1:  # as a rule: no need of a task
            await calls[0]
            calls = []
        # Not a task group: it would hide a Retryable in a group that the runner does not know.
        for failure in await asyncio.gather(*calls, return_exceptions=True):
            if failure is not None:
                raise failure
        frame = made.frame(tasks, self._lane, self._clock.now_us())
        self._count(made)
        keys: list[bytes | None] = [name.encode() for name in frame["request_id"].to_list()]
        return Outgoing(PREDICTIONS, frame, keys, batch.topic, batch.partition, batch.positions)

    async def _call(self, work: _Work, model: str, version: int, rows: Rows) -> None:
        made = work.made
        try:
            found = await self._deployments.ensure(model, version)
        except ModelError as error:
            made.fail(rows, f"model_error: {error}")
            return
        if found is None:
            made.fail(rows, f"unknown_model: no version {model}@{version}")
            return
        size = 4 * len(found.features)
        fits = np.array([len(work.vectors[row]) == size for row in rows.tolist()], dtype=bool)
        if not fits.all():
            made.fail(rows[~fits], f"bad_vector: the model takes {len(found.features)} columns")
            rows = rows[fits]
        await self._score(work, found, rows)

    async def _score(self, work: _Work, version: ModelVersion, rows: Rows) -> None:
        """Score rows in one call; when the model refuses them, halve until the bad ones stand
        alone."""
        if not len(rows):
            return
        inputs = matrix([work.vectors[row] for row in rows.tolist()], len(version.features))
        began = self._clock.monotonic()
        try:
            async with self._calls:
                about: dict[str, str | int] = {
                    "gen_ai.operation.name": "predict",
                    "gen_ai.provider.name": "triton",
                    "gen_ai.request.model": version.deployment,
                    "causemesh.rows": len(inputs),
                }
                with calling(f"predict {version.deployment}", about, work.batch, rows):
                    scores = await self._server.infer(version.deployment, inputs)
        except NotLoaded:
            self._deployments.forget(version.model, version.version)
            raise
        except ModelError as error:
            if len(rows) == 1:
                work.made.fail(rows, f"model_error: {error}")
                return
            middle = len(rows) // 2
            await self._score(work, version, rows[:middle])
            await self._score(work, version, rows[middle:])
            return
        work.made.predict(rows, scores, (self._clock.monotonic() - began) * 1000 / len(rows))

    def _count(self, made: Outcomes) -> None:
        if self._outcomes is None:
            return
        for outcome, count in Tally(made.outcome.tolist()).items():
            self._outcomes.labels("prediction", outcome).inc(count)

    def snapshot(self) -> bytes | None:
        """No state."""
        return None

    def restore(self, state: bytes | None) -> None:
        """No state."""
