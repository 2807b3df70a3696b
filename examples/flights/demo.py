"""The whole mesh on real flights, checked at the end: `make demo`.

Settings: DEMO_MONTHS (default 3), DEMO_DAYS (only the first days of the first month), DEMO_EXIT=1
(stop at the end also at a terminal), DEMO_KILL (by comma: services and servers that are ended by
kill -9 on the way, and what else `disturbing` knows), DEMO_SEED (of the moments of that),
DEMO_PARTITIONS (of each topic, default 2), DEMO_PROJECT (another folder with this project's files),
CAUSEMESH_HOME (default .causemesh).
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl

from causemesh.cli import running
from causemesh.cli.context import Connections, connections
from causemesh.cli.output import Output
from causemesh.client import Client, connect
from causemesh.collector import collect_seldom
from causemesh.errors import Fatal, Misdeclared, Retryable
from causemesh.local.mesh import Mesh
from examples.flights import model, probing, summing, training
from examples.flights.dataset import Replay, load, slices, with_defects
from examples.flights.disturbing import Disturbances
from examples.flights.following import Outcomes
from examples.flights.sending import surely
from examples.flights.summing import Story
from examples.flights.waiting import Waiting

PROJECT = Path(__file__).parent
TRAINED_FROM = datetime(2013, 3, 1, tzinfo=UTC)
_DAY_US = 86_400_000_000
_REQUESTS = "requests"
_MARKER = "demo"
_DATA = ("kafka", "pulsar", "registry", "postgres", "triton", "stripe", "lake", "checkpoints")
_SLICE_H, _DISTURBED_SLICE_H = 24, 1  # what the producer sends at once, hours of event time
_PARTITIONS = 2  # as many as the cores it is sized for; the results do not depend on it


class Demo:
    """One run, from empty data to the summary."""

    def __init__(
        self,
        home: Path,
        months: int,
        days: int | None,
        kill: Sequence[str],
        *,
        out: Output,
        seed: int | None = None,
        trained_from: datetime | None = TRAINED_FROM,
    ) -> None:
        """`trained_from`: when the version answers that is trained on all before it; None for none
        but the first version."""
        self._home = home
        self._trained_from = trained_from
        self._out = out
        self._sent = 0
        replay = load(months, days)
        departed, defects = with_defects(replay.departed)
        spoiled = Replay(departed, replay.landed, replay.weather, replay.requests)
        self._story = Story(spoiled, defects, list(kill), seed, months)

    async def run(self, mesh: Mesh) -> dict[str, Any]:
        """Replay, wait, check; returns the summary."""
        story = self._story
        began = time.monotonic()
        training.register(mesh, 1, model.baseline_onnx())
        training.roll_out(mesh, [(1, training.BEGINNING)])
        async with connections(self._home) as open_to, _client(open_to) as client:
            outcomes = Outcomes(open_to)
            disturbances = Disturbances(story.kill, mesh, self._out.progress, story.seed)
            following = asyncio.create_task(self._follow(mesh, outcomes, began))
            try:
                await disturbances.begin()
                end_us = await self._replay(mesh, open_to, client, outcomes, disturbances)
                waiting = Waiting(mesh, self._out.progress)
                await waiting.outcomes(outcomes, story.replay.requests.height)
                periods = _months_before(end_us)
                last_day = story.replay.requests["occurred_at"].dt.strftime("%Y-%m-%d").max()
                await waiting.settled(periods, str(last_day))
                story.recoveries = await disturbances.finish()
            finally:
                following.cancel()
                await disturbances.release()
                with suppress(asyncio.CancelledError):
                    await following
            story.seconds["replay"] = time.monotonic() - began
            await self.replayed(mesh)
            self._out.progress("probe", "asking for live predictions, one at a time")
            story.probe = await probing.probe(mesh, story.replay)
            await outcomes.catch_up()
            await outcomes.close()
            return await summing.summary(story, mesh, open_to, outcomes, periods)

    async def replayed(self, mesh: Mesh) -> None:
        """Called once, between the last finalised invoice and the checks; for benchmarks."""

    async def _replay(
        self,
        mesh: Mesh,
        open_to: Connections,
        client: Client,
        outcomes: Outcomes,
        disturbances: Disturbances,
    ) -> int:
        """Send everything in event time; returns the last watermark (microseconds).

        At the month that the second version answers from, the producer waits until all before it
        is predicted. From there on requests are held back until that version is trained on all of
        that and known. Events go on meanwhile: no vector depends on when they come. A disturbed
        producer waits for that, too, as each disturbance has its part of the work.
        """
        until_us = 0
        hours = _DISTURBED_SLICE_H if self._story.kill else _SLICE_H
        held: list[tuple[int, pl.DataFrame]] = []
        trained: asyncio.Task[None] | None = None
        try:
            for until_us, frames in slices(self._story.replay, hours):
                await disturbances.pace((self._sent + 1) / self._story.sent)
                held.append((until_us, frames.pop(_REQUESTS)))
                await self._send(client, until_us, frames)
                if trained is None or trained.done() or self._story.kill:
                    await self._ask(client, trained, held)
                if self._trained_from is not None and until_us == _micros(self._trained_from):
                    await self._predicted(mesh, outcomes, self._trained_from)
                    trained = asyncio.create_task(self._train(mesh, open_to, self._trained_from))
            await self._ask(client, trained, held)
        finally:
            if trained is not None:
                trained.cancel()
        month_end_us = _micros(
            datetime(2013 + self._story.months // 12, self._story.months % 12 + 1, 1, tzinfo=UTC)
        )
        # past every grace period, label wait and review time-out
        last_us = max(until_us, month_end_us) + 4 * _DAY_US
        for kind in self._story.replay.frames:
            await self._surely(client.watermark, kind, last_us)
        return last_us

    async def _send(self, client: Client, until_us: int, frames: dict[str, pl.DataFrame]) -> None:
        """One slice, and the watermark behind it."""
        for kind, frame in frames.items():
            if frame.height:
                await self._surely(client.produce, kind, frame)
                self._sent += frame.height
        for kind in frames:
            await self._surely(client.watermark, kind, until_us)

    async def _ask(
        self,
        client: Client,
        trained: asyncio.Task[None] | None,
        held: list[tuple[int, pl.DataFrame]],
    ) -> None:
        """Send the requests that were held back, once training is over."""
        if trained is not None:
            await trained
        for until_us, frame in held:
            await self._send(client, until_us, {_REQUESTS: frame})
        held.clear()

    async def _surely(self, send: Callable[..., Awaitable[Any]], *what: Any) -> None:
        await surely(send, *what, told=self._out.progress)

    async def _predicted(self, mesh: Mesh, outcomes: Outcomes, until: datetime) -> None:
        asked = self._story.replay.requests.filter(pl.col("occurred_at") < until).height
        await Waiting(mesh, self._out.progress).outcomes(outcomes, asked)

    async def _train(self, mesh: Mesh, open_to: Connections, since: datetime) -> None:
        began = time.monotonic()
        known = await training.logged(open_to, since)
        self._out.progress("training", f"version 2 on {known.height:,} logged vectors")
        trained = await asyncio.to_thread(training.fit, known)
        training.register(
            mesh, 2, trained.onnx, reference=trained.reference, metrics=trained.metrics
        )
        training.roll_out(mesh, [(1, training.BEGINNING), (2, since)])
        self._story.trained = trained
        self._story.seconds["training"] = time.monotonic() - began
        self._out.progress("training", f"AUC {trained.auc:.3f} on its last quarter; rolled out")

    async def _follow(self, mesh: Mesh, outcomes: Outcomes, began: float) -> None:
        """Show progress and watch memory."""
        shown = 0.0
        while True:
            with suppress(Retryable):  # the broker is away: the next round reads on
                await outcomes.catch_up()
            rss = sum(one.rss_bytes for one in mesh.status()) / 1e6
            self._story.peak_rss_mb = max(self._story.peak_rss_mb, rss)
            if time.monotonic() - shown >= 3.0:
                shown = time.monotonic()
                done = f"{self._sent:,}/{self._story.sent:,} sent, {outcomes.count:,} outcomes"
                self._out.progress(f"{shown - began:.0f} s", f"{done}, services {rss:,.0f} MB")
            await asyncio.sleep(0.5)


def _client(open_to: Connections) -> Any:
    return connect(settings=open_to.settings)


def _micros(at: datetime) -> int:
    return round(at.timestamp() * 1_000_000)


def _months_before(end_us: int) -> list[str]:
    """The months of 2013 that are over when the last watermark is sent."""
    end = datetime.fromtimestamp(end_us / 1e6, UTC)
    last = 12 if end.year > 2013 else end.month - 1
    return [f"2013-{month:02d}" for month in range(1, last + 1)]


def fresh_home(home: Path) -> None:
    """Empty a demo's data. Raises Misdeclared for a folder whose data is not a demo's."""
    mine = (home / _MARKER).exists()
    if not mine and any((home / name).exists() for name in _DATA):
        raise Misdeclared(
            f"{home} holds a mesh that is not a demo's, and the demo starts from nothing: set"
            " CAUSEMESH_HOME to another folder"
        )
    running.down(home)
    for name in (*_DATA, "logs", "run"):
        shutil.rmtree(home / name, ignore_errors=True)
    home.mkdir(parents=True, exist_ok=True)
    (home / _MARKER).touch()


def main() -> int:
    """Run the demo; the exit status says whether every check passed."""
    collect_seldom()  # the recount reads whole topics
    home = Path(os.environ.get("CAUSEMESH_HOME", ".causemesh"))
    months = int(os.environ.get("DEMO_MONTHS", "3"))
    days = os.environ.get("DEMO_DAYS")
    kill = [name for name in os.environ.get("DEMO_KILL", "").split(",") if name]
    out = Output()
    stay = sys.stdout.isatty() and os.environ.get("DEMO_EXIT") != "1"
    partitions = int(os.environ.get("DEMO_PARTITIONS", _PARTITIONS))
    began = time.monotonic()
    fresh_home(home)
    seed = os.environ.get("DEMO_SEED")
    first = int(days) if days else None
    demo = Demo(home, months, first, kill, out=out, seed=int(seed) if seed else None)
    try:
        project = Path(os.environ.get("DEMO_PROJECT", PROJECT))
        mesh = running.up(home, project, out.progress, partitions=partitions)
        out.progress("ready", f"after {time.monotonic() - began:.0f} s")
        summary = asyncio.run(demo.run(mesh))
        (home / "demo-summary.json").write_text(json.dumps(summary, indent=2, default=str))
        summing.show(summary, out)
        out.line(f"The summary is in {home / 'demo-summary.json'}")
        if stay:
            _look_around(mesh, summary, out)
    finally:
        running.down(home, out.progress)
    return 0 if summary["passed"] else 1


def _look_around(mesh: Mesh, summary: dict[str, Any], out: Output) -> None:
    """Leave the mesh up until Ctrl-C."""
    out.rows("Admin APIs", [{"service": n, "docs": f"{mesh.url(n)}/docs"} for n in mesh.services])
    out.line(f"token: {mesh.token}")
    line = summary["trace"]["tree"]["title"].removeprefix("invoice line ")
    out.line(f"try: causemesh trace '{line}' --verify")
    out.line("The mesh stays up; Ctrl-C or `make down` stops it.")
    with suppress(KeyboardInterrupt):
        while True:
            time.sleep(3600)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (Fatal, Misdeclared) as error:
        sys.exit(f"demo: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
