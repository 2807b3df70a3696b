"""Runs a stage: a worker for every partition this process owns, restarted when one fails."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress

import structlog

from causemesh.bus.base import Membership
from causemesh.clock import Clock
from causemesh.errors import Fatal, Fenced, Retryable
from causemesh.runner.worker import PartitionWorker, rest

_REPORT_S = 2.0
_FENCED_S = 2.0  # longer than a process takes to hear that a partition is no longer its own
_LOOK_S = 0.05
_log = structlog.get_logger(__name__)


class Runner:
    """Follows the group's assignments for one stage.

    `make_worker(partition)` builds a fresh worker. A worker that raises Retryable is started again,
    from the stored position, after its wait. Fenced means that another process claimed the
    partition: the group's next assignment says so, and until one does the worker is started again
    too, since the other may have claimed what was no longer its own. Fatal ends the runner with
    that error. `restarts` bounds the Fatal errors in a row that are taken for passing ones.
    """

    def __init__(
        self,
        membership: Membership,
        make_worker: Callable[[int], PartitionWorker],
        clock: Clock,
        *,
        restarts: int = 3,
    ) -> None:
        self._membership = membership
        self._make_worker = make_worker
        self._clock = clock
        self._restarts = restarts
        self.workers: dict[int, PartitionWorker] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._stop = asyncio.Event()

    async def run(self) -> None:
        """Work until `stop`; finishes units in progress, leaves the group, then returns."""
        reports = asyncio.create_task(self._report())
        stopped = asyncio.create_task(self._stop.wait())
        try:
            while not self._stop.is_set():
                await self._follow(stopped)
        finally:
            reports.cancel()
            stopped.cancel()
            await self._own(frozenset())
            await self._membership.close()

    async def _follow(self, stopped: asyncio.Task[bool]) -> None:
        """One assignment, or the end of a worker, or the order to stop; whichever is first."""
        change = asyncio.create_task(self._membership.changed())
        try:
            while not change.done() and not stopped.done():
                waiting = {change, stopped, *self._tasks.values()}
                await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                self._reap()
            if change.done():
                await self._own(change.result())
        finally:
            if not change.done():
                change.cancel()
                with suppress(asyncio.CancelledError):
                    await change

    def stop(self) -> None:
        """Ask the runner to finish."""
        self._stop.set()

    def _reap(self) -> None:
        for partition, task in list(self._tasks.items()):
            if task.done():
                del self._tasks[partition]
                self.workers.pop(partition, None)
                task.result()

    async def _own(self, partitions: frozenset[int]) -> None:
        leaving = {number: task for number, task in self._tasks.items() if number not in partitions}
        for number in leaving:
            self.workers[number].stopping = True
        if leaving:
            await asyncio.wait(leaving.values())
        self._reap()
        for number in partitions - self._tasks.keys():
            # Made here, not in the task: it can be told to stop before the task's first step.
            worker = self.workers[number] = self._make_worker(number)
            self._tasks[number] = asyncio.create_task(self._keep_running(number, worker))

    async def _keep_running(self, partition: int, worker: PartitionWorker) -> None:
        failures = 0
        while not worker.stopping:
            log = _log.bind(group=worker.stage.group, partition=partition)
            try:
                await worker.run()
                return
            except Fenced as error:
                log.info("worker_fenced", reason=str(error))
                await rest(worker, self._clock, _FENCED_S, _LOOK_S)
            except Retryable as error:
                log.warning("worker_restarts", reason=str(error))
                await rest(worker, self._clock, error.retry_after, _LOOK_S)
            except Fatal as error:
                failures = failures + 1 if not worker.committed else 1
                log.error("worker_failed", reason=str(error), failures=failures)
                if failures >= self._restarts:
                    raise
                await rest(worker, self._clock, 0.5 * 2**failures, _LOOK_S)
            if not worker.stopping:
                worker = self.workers[partition] = self._make_worker(partition)

    async def _report(self) -> None:
        while True:
            await self._clock.sleep(_REPORT_S)
            positions = {
                source: at
                for worker in self.workers.values()
                for source, at in worker.positions.items()
                if source[0] in worker.stage.shared
            }
            await self._membership.report(positions)
