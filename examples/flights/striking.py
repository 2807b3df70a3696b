"""The single blows: what is done to a process, the proof that it was felt, and the recovery."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import psutil

from causemesh.errors import Fatal
from causemesh.local import Cluster
from causemesh.local.mesh import Mesh
from causemesh.local.process import ServerProcess
from examples.flights.midcall import ModelCalls
from examples.flights.recovering import Commits, Recovery

_PAUSED_S = 10.0  # longer than the session timeout: the group gives its partitions to others
_READY_S = 60.0
_SETTLE_S = 0.5
_POLL_S = 0.02
_ALL_WAIT_FOR = {"kafka", "pulsar", "postgres"}
"""Servers without which no service works: their return is measured by what inference commits."""


@dataclass(frozen=True)
class Target:
    """A service or server of a mesh, and where commits are seen."""

    mesh: Mesh
    commits: Commits
    name: str

    def process(self) -> psutil.Process:
        """The service's process. Raises Fatal when it does not run."""
        found = self.mesh.process(self.name).running()
        if found is None:
            raise Fatal(f"{self.name} does not run, so it can't be disturbed")
        return found


async def kill(on: Target) -> dict[str, Any]:
    """End a service by kill -9; its supervisor starts it again."""
    process, sessions = on.process(), await on.commits.backends(on.name)
    recovery = Recovery(on.commits, on.name)
    await asyncio.to_thread(_end_now, process)
    await on.commits.gone(on.name, sessions)
    await recovery.since_now()
    found = await recovery.work(reclaimed=True)
    await wait_ready(on.mesh, on.name)
    # how many processes wanted a processor: without it the times can't be compared
    return {**found, "load": round(os.getloadavg()[0], 1)}


async def pause(on: Target) -> dict[str, Any]:
    """Stop a service for longer than its session lasts, without it noticing."""
    process = on.process()
    lost = Recovery(on.commits, on.name)
    await lost.since_now()
    process.suspend()
    try:
        await asyncio.sleep(_PAUSED_S)
    finally:
        process.resume()
    resumed = Recovery(on.commits, on.name)
    await resumed.since_now()
    return {"paused_s": _PAUSED_S, **await resumed.work(reclaimed=True)}


async def take_over(on: Target) -> dict[str, Any]:
    """Stop a service, let a second process take its partitions over, and let the first go on: two
    owners at once, of whom one does not know that it was replaced."""
    process, log = on.process(), on.mesh.process(on.name).log
    lost = Recovery(on.commits, on.name)
    await lost.since_now()
    standby = _standby(on)
    process.suspend()
    began, read = time.monotonic(), log.stat().st_size
    try:
        standby.start([sys.executable, "-m", f"services.{on.name}.app"])
        found: dict[str, Any] = {"taken_over_s": await lost.reclaimed()}
        found |= await lost.work(reclaimed=True)
        await asyncio.sleep(max(0.0, _PAUSED_S - (time.monotonic() - began)))
    finally:
        process.resume()
    resumed = Recovery(on.commits, on.name)
    await resumed.since_now()
    found["resumed_work_s"] = (await resumed.work(reclaimed=False))["work_s"]
    await asyncio.to_thread(standby.stop)
    left = Recovery(on.commits, on.name)
    await left.since_now()
    await left.work(reclaimed=False)
    return found | {"fenced": _since(log, read).count('"worker_fenced"')}


async def strike_server(
    on: Target,
    cluster: Cluster,
    end: Callable[[str], None],
    progress: Callable[[str, str], None],
) -> dict[str, Any]:
    """End a server by `end` and start it again; its dependants must get on by themselves."""
    recovery = Recovery(on.commits, "inference")
    await asyncio.to_thread(end, on.name)
    starting = asyncio.create_task(asyncio.to_thread(cluster.up, progress))
    # What was done before it was gone is committed by now; nothing new can be.
    await asyncio.sleep(_SETTLE_S)
    if on.name in _ALL_WAIT_FOR:
        await recovery.since_now()
    await starting
    found: dict[str, Any] = {"started_s": round(recovery.passed(), 2)}
    if on.name in _ALL_WAIT_FOR:
        found |= await recovery.work(reclaimed=False)
    return found


async def strike_triton(
    on: Target, cluster: Cluster, progress: Callable[[str, str], None]
) -> dict[str, Any]:
    """End Triton while it has calls under way, and start it again."""
    process = ServerProcess("triton", on.mesh.home).running()
    if process is None:
        raise Fatal("triton does not run, so it can't be disturbed")
    calls = ModelCalls(*cluster.triton_addresses())
    log = on.mesh.process("inference").log
    with calls.held(process) as waiting:
        read, began = log.stat().st_size, time.monotonic()
        cluster.kill("triton")
    await asyncio.to_thread(cluster.up, progress)
    started_s = time.monotonic() - began
    while not await asyncio.to_thread(calls.done):
        if time.monotonic() - began > _READY_S:
            raise Fatal(f"no call was answered in {_READY_S:.0f} s")
        await asyncio.sleep(_POLL_S)
    return {
        "started_s": round(started_s, 2),
        "work_s": round(time.monotonic() - began, 2),
        "in_flight": waiting,
        "cut_off": _calls_cut_off(_since(log, read)),
    }


def _calls_cut_off(log: str) -> int:
    """How many times inference lost a call to the server that ended, rather than found none."""
    return sum(
        "Triton is away" in line and "failed to connect" not in line for line in log.splitlines()
    )


def _since(log: Any, read: int) -> str:
    with log.open("rb") as lines:
        lines.seek(read)
        return str(lines.read().decode(errors="replace"))


def _end_now(process: psutil.Process) -> None:
    """Returns when the process is no more; who started it may not have noticed yet."""
    process.kill()
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        time.sleep(_POLL_S)


def _standby(on: Target) -> ServerProcess:
    usual = on.mesh.process(on.name)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = {"CAUSEMESH_API_PORT": str(free.getsockname()[1])}
    return replace(usual, name=f"{on.name}-standby", environment={**usual.environment, **port})


async def wait_ready(mesh: Mesh, service: str) -> None:
    """Wait until a service says it is ready. Raises Fatal when it takes too long."""
    deadline = time.monotonic() + _READY_S
    while not await asyncio.to_thread(mesh.ready, service):
        if time.monotonic() > deadline:
            raise Fatal(f"{service} was not ready again in {_READY_S:.0f} s")
        await asyncio.sleep(_POLL_S)
