"""Disturbances on the way: services and servers ended by kill -9, services paused."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from causemesh.cli.running import servers
from causemesh.errors import Misdeclared
from causemesh.local import Cluster
from causemesh.local.mesh import Mesh

PAUSE = "pause:"
_PAUSED_S = 10.0  # longer than the session timeout: the group gives its partitions to others


class Disturbances:
    """One after the other, spread over the replay.

    A name is a service or a server, which is ended at once (services are started again by their
    supervisor, servers here), or `pause:<service>`, which stops for ten seconds without noticing.
    """

    def __init__(self, names: Sequence[str], mesh: Mesh, progress: Callable[[str, str], None]):
        known = {*mesh.services, *servers(), *(PAUSE + name for name in mesh.services)}
        unknown = sorted(set(names) - known)
        if unknown:
            raise Misdeclared(f"DEMO_KILL: {unknown} is none of {', '.join(sorted(known))}")
        self._left = list(names)
        self._total = len(names)
        self._mesh = mesh
        self._progress = progress
        self._one_at_a_time = asyncio.Lock()

    async def at(self, share: float) -> None:
        """Do what is due when `share` (0 to 1) of the outcomes is there."""
        async with self._one_at_a_time:
            done = self._total - len(self._left)
            if self._left and share >= (done + 1) / (self._total + 1):
                await self._disturb(self._left.pop(0))

    async def rest(self) -> None:
        """Do what is left: the last outcomes may all have come at once."""
        async with self._one_at_a_time:
            while self._left:
                await self._disturb(self._left.pop(0))

    async def _disturb(self, name: str) -> None:
        if name.startswith(PAUSE):
            await self._pause(name.removeprefix(PAUSE))
        elif name in self._mesh.services:
            self._progress("kill -9", name)
            self._mesh.kill(name)
        else:
            self._progress("kill -9", name)
            cluster = Cluster(self._mesh.home, servers())
            await asyncio.to_thread(cluster.kill, name)
            await asyncio.to_thread(cluster.up, self._progress)

    async def _pause(self, service: str) -> None:
        process = self._mesh.process(service).running()
        if process is None:
            return
        self._progress("pause", f"{service} for {_PAUSED_S:.0f} s")
        process.suspend()
        try:
            await asyncio.sleep(_PAUSED_S)
        finally:
            process.resume()
