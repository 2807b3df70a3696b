"""Services that end themselves at a step of the protocol, one declared step after the other."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import psutil

from causemesh.faultpoints import Point
from causemesh.local.mesh import Mesh
from causemesh.local.process import ServerProcess

FAULT = "fault:"
# In the middle of the work: the first units after a start hold little or nothing.
_TIMES = dict.fromkeys(
    (
        Point.WORKER_FETCHED,
        Point.WORKER_PROCESSED,
        Point.WORKER_SENT,
        Point.WORKER_COMMITTING,
    ),
    3,
)
_POLL_S = 0.05


class FaultWalk:
    """Services that end themselves, one declared step after the other.

    Meanwhile this keeps the services running in their supervisor's place: an ended one starts again
    at once with its next point armed.
    """

    def __init__(
        self, points: Sequence[Point], mesh: Mesh, progress: Callable[[str, str], None]
    ) -> None:
        self._mesh = mesh
        self._progress = progress
        self.left = list(points)
        self.recoveries: list[dict[str, Any]] = []
        self._all = len(points)
        self._armed: dict[str, Point] = {}
        self._supervisor: psutil.Process | None = None
        self.begun = False

    def begin(self) -> None:
        """Take over from the supervisor and start the walk's services with their first points."""
        if not self.left:
            return
        self.begun = True
        self._supervisor = ServerProcess("supervisor", self._mesh.home).running()
        if self._supervisor is not None:
            self._supervisor.suspend()
        for service in sorted({_service(point) for point in self.left}):
            self._mesh.kill(service)
            # not waited for by its parent, which is suspended: it lingers as a zombie
            while self._mesh.process(service).running() is not None:
                time.sleep(_POLL_S)
            self._start(service)

    @property
    def over(self) -> bool:
        """Whether every point was reached, and its service is ready again."""
        return len(self.recoveries) == self._all

    def step(self) -> None:
        """Start what ended, and note how long it took."""
        if self._supervisor is None:
            return
        for service in self._mesh.services:
            if self._mesh.process(service).running() is not None:
                continue
            began, point = time.monotonic(), self._armed.pop(service, None)
            if point is not None:
                self._progress("fault", point)
                self.left.remove(point)
            self._start(service)
            self._wait_ready(service)
            if point is not None:
                ready_s = round(time.monotonic() - began, 2)
                self.recoveries.append({"what": f"{FAULT}{point}", "ready_s": ready_s})

    def end(self) -> None:
        """Let the supervisor go on."""
        if self._supervisor is not None:
            self._supervisor.resume()
            self._supervisor = None

    def _wait_ready(self, service: str) -> None:
        """Until it is ready, or already at its next point."""
        process = self._mesh.process(service)
        while process.running() is not None and not self._mesh.ready(service):
            time.sleep(_POLL_S)

    def _start(self, service: str) -> None:
        process = self._mesh.process(service)
        point = next((one for one in self.left if _service(one) == service), None)
        if point is not None:
            self._armed[service] = point
            fault = {"CAUSEMESH_FAULT": f"{point}:kill:{_TIMES.get(point, 1)}"}
            process = replace(process, environment={**process.environment, **fault})
        process.start([sys.executable, "-m", f"services.{service}.app"])


def _service(point: Point) -> str:
    """Whose step it is; the kit's own are walked in features and, for the outbox, in billing."""
    owner = point.split(".")[0]
    return {"worker": "features", "outbox": "billing"}.get(owner, owner)
