"""Disturbances on the way: services and servers ended by kill -9, paused, or stopped at a step."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import httpx
import psutil

from causemesh.cli.running import servers
from causemesh.errors import Fatal, Misdeclared
from causemesh.faultpoints import Point
from causemesh.local import Cluster
from causemesh.local.mesh import Mesh
from causemesh.local.process import ServerProcess
from causemesh.local.servers import StripeStandIn

PAUSE, RESTART, FAULT, STRIPE = "pause:", "restart:", "fault:", "stripe:"
STRIPE_FAULTS: dict[str, dict[str, Any]] = {
    "timeout": {"next": "timeout_after_commit", "count": 3, "method": "POST"},
    "500": {"next": 500, "count": 3, "when": "before", "method": "POST"},
    "500-after": {"next": 500, "count": 3, "when": "after", "method": "POST"},
    "429": {"next": 429, "count": 3},
}
_PAUSED_S = 10.0  # longer than the session timeout: the group gives its partitions to others
_READY_S = 60.0
_POLL_S = 0.05


class Disturbances:
    """One after the other, spread over the replay.

    A name is a service or a server, which is ended at once (services are started again by their
    supervisor, servers here); `pause:<service>`, which stops for ten seconds without noticing;
    `restart:<server>`, an orderly one; `fault:<point>`, a service that ends itself at that step
    (one service at a time waits for its points, in the order given); or `stripe:<fault>`, what the
    stand-in for Stripe does to the next calls.
    """

    def __init__(self, names: Sequence[str], mesh: Mesh, progress: Callable[[str, str], None]):
        known = known_disturbances(mesh.services)
        unknown = sorted(set(names) - known)
        if unknown:
            raise Misdeclared(f"DEMO_KILL: {unknown} is none of {', '.join(sorted(known))}")
        self._mesh = mesh
        self._progress = progress
        self._faults = [name.removeprefix(STRIPE) for name in names if name.startswith(STRIPE)]
        points = [Point(name.removeprefix(FAULT)) for name in names if name.startswith(FAULT)]
        self._walk = FaultWalk(points, mesh, progress)
        self._left = [name for name in names if not name.startswith((STRIPE, FAULT))]
        if points and self._left:
            raise Misdeclared("DEMO_KILL: fault points go alone, or with stripe faults")
        self._total = len(self._left)
        self._one_at_a_time = asyncio.Lock()
        self._recoveries: list[dict[str, Any]] = []

    async def prepare(self) -> None:
        """Order Stripe's faults and arm the first fault points."""
        async with self._one_at_a_time:
            if self._faults:
                await asyncio.to_thread(self._order_stripe_faults)
            await asyncio.to_thread(self._walk.begin)

    async def at(self, share: float) -> None:
        """Do what is due when `share` (0 to 1) of the outcomes is there."""
        async with self._one_at_a_time:
            await asyncio.to_thread(self._walk.step)
            done = self._total - len(self._left)
            if self._left and share >= (done + 1) / (self._total + 1):
                await self._disturb(self._left.pop(0))

    async def rest(self) -> None:
        """Do what is left: the last outcomes may all have come at once."""
        async with self._one_at_a_time:
            while self._left:
                await self._disturb(self._left.pop(0))

    def finish(self) -> list[dict[str, Any]]:
        """How long each took to be ready again, seconds. Raises Fatal when one never happened."""
        if self._walk.left:
            raise Fatal(f"never reached: {', '.join(self._walk.left)}")
        return [*self._recoveries, *self._walk.recoveries]

    def release(self) -> None:
        """Give the services back to their supervisor."""
        self._walk.end()

    def _order_stripe_faults(self) -> None:
        port = int(Cluster(self._mesh.home, servers()).endpoints.stripe_url.rpartition(":")[2])
        stand_in = StripeStandIn(self._mesh.home, port)
        stand_in.stop()
        stand_in.start_with_faults()
        for name in self._faults:
            self._progress("stripe", name)
            url = f"http://127.0.0.1:{port}/_faults"
            httpx.post(url, json=STRIPE_FAULTS[name]).raise_for_status()

    async def _disturb(self, name: str) -> None:
        kind, _, what = name.rpartition(":")
        self._progress(kind or "kill -9", what)
        if name.startswith(PAUSE):
            await self._pause(what)
            return
        began = time.monotonic()
        if what in self._mesh.services:
            self._mesh.kill(what)
            await asyncio.to_thread(wait_ready, self._mesh, what)
        else:
            cluster = Cluster(self._mesh.home, servers())
            end = self._stop_server if kind else cluster.kill
            await asyncio.to_thread(end, what)
            await asyncio.to_thread(cluster.up, self._progress)
        self._recoveries.append({"what": name, "ready_s": round(time.monotonic() - began, 2)})

    def _stop_server(self, name: str) -> None:
        ServerProcess(name, self._mesh.home).stop(timeout_s=30)

    async def _pause(self, service: str) -> None:
        process = self._mesh.process(service).running()
        if process is None:
            return
        process.suspend()
        try:
            await asyncio.sleep(_PAUSED_S)
        finally:
            process.resume()


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
        self._armed: dict[str, Point] = {}
        self._supervisor: psutil.Process | None = None

    def begin(self) -> None:
        """Take over from the supervisor and start the walk's services with their first points."""
        if not self.left:
            return
        self._supervisor = ServerProcess("supervisor", self._mesh.home).running()
        if self._supervisor is not None:
            self._supervisor.suspend()
        for service in sorted({_service(point) for point in self.left}):
            self._mesh.kill(service)
            # not waited for by its parent, which is suspended: it lingers as a zombie
            while self._mesh.process(service).running() is not None:
                time.sleep(_POLL_S)
            self._start(service)

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
            fault = {"CAUSEMESH_FAULT": f"{point}:kill"}
            process = replace(process, environment={**process.environment, **fault})
        process.start([sys.executable, "-m", f"services.{service}.app"])


def known_disturbances(services: Sequence[str]) -> set[str]:
    """Every name that DEMO_KILL may hold."""
    return {
        *services,
        *servers(),
        *(PAUSE + name for name in services),
        *(RESTART + name for name in servers()),
        *(FAULT + point for point in Point),
        *(STRIPE + name for name in STRIPE_FAULTS),
    }


def wait_ready(mesh: Mesh, service: str) -> None:
    """Wait until a service is ready. Raises Fatal when it takes too long."""
    deadline = time.monotonic() + _READY_S
    while not mesh.ready(service):
        if time.monotonic() > deadline:
            raise Fatal(f"{service} was not ready again in {_READY_S:.0f} s")
        time.sleep(_POLL_S)


def _service(point: Point) -> str:
    """Whose step it is; the kit's own are walked in features and, for the outbox, in billing."""
    owner = point.split(".")[0]
    return {"worker": "features", "outbox": "billing"}.get(owner, owner)
