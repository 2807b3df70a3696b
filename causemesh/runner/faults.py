"""What happens when a unit of work fails."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import structlog

from causemesh.clock import Clock
from causemesh.errors import Fatal, MeshError, Poison, Retryable
from causemesh.runner.batch import Batch, Processor
from causemesh.runner.deadletters import DeadRows, raw_rows
from causemesh.runner.stage import Limits

_log = structlog.get_logger(__name__)
Attempt = Callable[[Sequence[Batch], DeadRows], Awaitable[None]]
Rehearse = Callable[[Sequence[Batch]], Awaitable[None]]


class Faults:
    """Retries, isolates and dead-letters, so that one bad row costs nothing but itself."""

    def __init__(
        self, clock: Clock, limits: Limits, stopping: Callable[[], bool] = lambda: False
    ) -> None:
        self._clock = clock
        self._limits = limits
        self._stopping = stopping

    async def contain(
        self, processor: Processor, batches: Sequence[Batch], attempt: Attempt, rehearse: Rehearse
    ) -> None:
        """Run one unit until it commits.

        Retryable waits and tries again until it works or the worker is to stop; Poison drops the
        rows to the dead letters; an unknown exception is retried `Limits.attempts` times, then each
        row is rehearsed alone (and rolled back) and those that raise are dead-lettered. A stateful
        processor is never repeated in place: its error goes up and the worker starts over from the
        checkpoint.
        """
        dead: DeadRows = []
        if not processor.takes_bad_rows:
            dead = [(batch, dict(batch.bad)) for batch in batches if batch.bad]
        left = list(batches)
        failures = 0
        while True:
            try:
                await attempt(left, dead)
                return
            except Poison as poison:
                self._bury(left, dead, poison)
            except Retryable as error:
                if processor.stateful or self._stopping():
                    raise
                _log.warning("unit_waits", reason=str(error))
                await self._clock.sleep(error.retry_after)
            except MeshError:
                raise
            except Exception as error:
                failures += 1
                _log.warning("unit_failed", reason=repr(error), failures=failures)
                if processor.stateful:
                    raise Fatal(f"unknown error: {error!r}") from error
                if failures < self._limits.attempts:
                    await self._clock.sleep(self._limits.retry_s * 2**failures)
                    continue
                await self._isolate(left, dead, rehearse, error)
                failures = 0

    @staticmethod
    def _bury(left: list[Batch], dead: DeadRows, poison: Poison) -> None:
        batch = left[poison.batch]
        dead.append((batch, raw_rows(batch, poison.rows)))
        left[poison.batch] = batch.without(list(poison.rows))

    async def _isolate(
        self, left: list[Batch], dead: DeadRows, rehearse: Rehearse, cause: Exception
    ) -> None:
        found = False
        for number, batch in enumerate(left):
            reasons = {}
            for row in range(len(batch)):
                alone = batch.without([other for other in range(len(batch)) if other != row])
                reason = await self._rehearse(alone, rehearse)
                if reason is not None:
                    reasons[row] = reason
            if reasons:
                found = True
                self._bury(left, dead, Poison(reasons, batch=number))
        if not found:
            raise Fatal(f"a unit fails but none of its rows does alone: {cause!r}") from cause

    @staticmethod
    async def _rehearse(alone: Batch, rehearse: Rehearse) -> str | None:
        try:
            await rehearse([alone])
        except Poison as poison:
            return poison.rows.get(0, str(poison))
        except MeshError:
            raise
        except Exception as error:  # noqa: BLE001 - it becomes the reason on the dead letter
            return f"{type(error).__name__}: {error}"[:500]
        return None
