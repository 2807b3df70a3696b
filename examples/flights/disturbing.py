"""Disturbances on the way: services and servers ended by kill -9, paused, or stopped at a step."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import httpx

from causemesh.cli.running import servers
from causemesh.errors import Fatal, Misdeclared
from causemesh.faultpoints import Point
from causemesh.local import Cluster
from causemesh.local.mesh import Mesh
from causemesh.local.servers import StripeStandIn
from examples.flights import striking
from examples.flights.recovering import Commits
from examples.flights.walking import FAULT, FaultWalk

PAUSE, TAKEOVER, RESTART, STRIPE = "pause:", "takeover:", "restart:", "stripe:"
STRIPE_FAULTS: dict[str, dict[str, Any]] = {
    "timeout": {"next": "timeout_after_commit", "count": 3, "method": "POST"},
    "500": {"next": 500, "count": 3, "when": "before", "method": "POST"},
    "500-after": {"next": 500, "count": 3, "when": "after", "method": "POST"},
    "409": {"next": "timeout_while_running", "count": 3, "delay_ms": 5_000, "method": "POST"},
    "429": {"next": 429, "count": 3},
}
_WALK_S = 90.0  # as long as features takes to end itself at each of its steps
_POLL_S = 0.05


class Disturbances:
    """One after the other, at random moments of the replay.

    A name is a service or a server, which is ended at once (services are started again by their
    supervisor, servers here); `pause:<service>`, which stops for ten seconds without noticing;
    `takeover:<service>`, the same while a second process of it takes its partitions over;
    `restart:<server>`, an orderly one; `fault:<point>`, a service that ends itself at that step
    (one service at a time waits for its points, in the order given); or `stripe:<fault>`, what the
    stand-in for Stripe does to the next calls.

    The producer asks `pace` before it sends, so that there is work during all of them.
    """

    def __init__(
        self,
        names: Sequence[str],
        mesh: Mesh,
        progress: Callable[[str, str], None],
        seed: int | None = None,
    ):
        known = known_disturbances(mesh.services)
        unknown = sorted(set(names) - known)
        if unknown:
            raise Misdeclared(f"DEMO_KILL: {unknown} is none of {', '.join(sorted(known))}")
        self._mesh = mesh
        self._progress = progress
        self._random = random.Random(seed)
        self._faults = [name.removeprefix(STRIPE) for name in names if name.startswith(STRIPE)]
        points = [Point(name.removeprefix(FAULT)) for name in names if name.startswith(FAULT)]
        self._walk = FaultWalk(points, mesh, progress)
        self._left = [name for name in names if not name.startswith((STRIPE, FAULT))]
        if points and self._left:
            raise Misdeclared("DEMO_KILL: fault points go alone, or with stripe faults")
        self._total = len(self._left)
        self._commits = Commits(mesh)
        self._began = self._since = time.monotonic()
        self._slowness_s = 1.0
        self._task: asyncio.Task[None] | None = None
        self._records: list[dict[str, Any]] = []

    async def begin(self) -> None:
        """Order Stripe's faults, arm the first fault points, and go on by itself from here."""
        if self._faults:
            await asyncio.to_thread(self._order_stripe_faults)
        await asyncio.to_thread(self._walk.begin)
        self._began = time.monotonic()
        self._task = asyncio.create_task(self._run())

    async def pace(self, share: float) -> None:
        """Wait until `share` (0 to 1) of the replay may be sent.

        Each disturbance has an equal part of it, sent ever slower: never all, so that there is
        always more to come, and the rest at once when it is over. Raises what went wrong.
        """
        while share > self._allowed():
            if self._task is not None and self._task.done():
                self._task.result()
            await asyncio.sleep(_POLL_S)

    def _allowed(self) -> float:
        if self._walk.left:
            return (time.monotonic() - self._began) / _WALK_S
        if not self._left:
            return 1.0
        passed_s = time.monotonic() - self._since
        part = passed_s / (passed_s + self._slowness_s)
        return (self._total - len(self._left) + part) / self._total

    async def finish(self) -> list[dict[str, Any]]:
        """What happened and how long each took, seconds. Raises Fatal when one never happened."""
        await self.pace(1.0)
        if self._walk.left:
            raise Fatal(f"never reached: {', '.join(self._walk.left)}")
        while not self._walk.over:  # the last service is starting
            if self._task is not None and self._task.done():
                self._task.result()
            await asyncio.sleep(_POLL_S)
        if self._faults:
            self._records.append(await asyncio.to_thread(self._stripe_report))
        return [*self._records, *self._walk.recoveries]

    async def release(self) -> None:
        """Give the services back to their supervisor."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._walk.end()
        await self._commits.close()

    async def _run(self) -> None:
        while self._left:
            self._since = time.monotonic()
            self._slowness_s = self._random.uniform(2.0, 8.0)
            await asyncio.sleep(self._random.uniform(0.3, 2.0))
            name = self._left[0]
            kind, _, what = name.rpartition(":")
            self._progress(kind or "kill -9", what)
            found = await self._disturb(f"{kind}:", what)
            self._records.append({"what": name, **found})
            self._progress("recovered", f"{name}: {found}")
            self._left.pop(0)
        while self._walk.begun:
            await asyncio.to_thread(self._walk.step)
            await asyncio.sleep(_POLL_S)

    async def _disturb(self, kind: str, what: str) -> dict[str, Any]:
        on = striking.Target(self._mesh, self._commits, what)
        if kind == PAUSE:
            return await striking.pause(on)
        if kind == TAKEOVER:
            return await striking.take_over(on)
        if what in self._mesh.services:
            return await striking.kill(on)
        cluster = Cluster(self._mesh.home, servers())
        if what == "triton" and kind != RESTART:
            return await striking.strike_triton(on, cluster, self._progress)
        end = cluster.stop if kind == RESTART else cluster.kill
        return await striking.strike_server(on, cluster, end, self._progress)

    def _stripe(self) -> tuple[StripeStandIn, str]:
        port = int(Cluster(self._mesh.home, servers()).endpoints.stripe_url.rpartition(":")[2])
        return StripeStandIn(self._mesh.home, port), f"http://127.0.0.1:{port}/_faults"

    def _order_stripe_faults(self) -> None:
        stand_in, url = self._stripe()
        stand_in.stop()
        stand_in.start_with_faults()
        for name in self._faults:
            self._progress("stripe", name)
            httpx.post(url, json=STRIPE_FAULTS[name]).raise_for_status()

    def _stripe_report(self) -> dict[str, Any]:
        report = httpx.get(self._stripe()[1]).raise_for_status().json()
        return {"what": STRIPE, **report}


def known_disturbances(services: Sequence[str]) -> set[str]:
    """Every name that DEMO_KILL may hold."""
    return {
        *services,
        *servers(),
        *(PAUSE + name for name in services),
        *(TAKEOVER + name for name in services),
        *(RESTART + name for name in servers()),
        *(FAULT + point for point in Point),
        *(STRIPE + name for name in STRIPE_FAULTS),
    }
