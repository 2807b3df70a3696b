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
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl
import yaml

from causemesh.cli import running, tracing
from causemesh.cli.context import Connections, connections
from causemesh.cli.output import Output
from causemesh.client import Client, connect
from causemesh.collector import collect_seldom
from causemesh.errors import Fatal, Misdeclared, Retryable
from causemesh.local.mesh import Mesh
from examples.flights import asking, at_stripe, checking, model, probing, training
from examples.flights.checking import Check
from examples.flights.dataset import Defects, Replay, load, slices, with_defects
from examples.flights.disturbing import Disturbances
from examples.flights.following import Outcomes
from examples.flights.waiting import Waiting

PROJECT = Path(__file__).parent
TRAINED_FROM = datetime(2013, 3, 1, tzinfo=UTC)
_DAY_US = 86_400_000_000
_REQUESTS = "requests"
_MARKER = "demo"
_DATA = ("kafka", "pulsar", "registry", "postgres", "triton", "stripe", "lake", "checkpoints")
_MOST_RSS_MB = 2_500
_AWAY_S = 180.0
_SLICE_H, _DISTURBED_SLICE_H = 24, 1  # what the producer sends at once, hours of event time
_PARTITIONS = 2  # as many as the cores it is sized for; the results do not depend on it


@dataclass
class Story:
    """What the demo knows on its way."""

    replay: Replay
    defects: Defects
    kill: list[str]
    seed: int | None
    trained: model.Trained | None = None
    probe: dict[str, float] = field(default_factory=dict)
    peak_rss_mb: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    recoveries: list[dict[str, Any]] = field(default_factory=list)

    @property
    def sent(self) -> int:
        """How many records the producer writes."""
        return sum(frame.height for frame in self.replay.frames.values())


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
    ) -> None:
        self._home = home
        self._months = months
        self._out = out
        self._sent = 0
        replay = load(months, days)
        departed, defects = with_defects(replay.departed)
        spoiled = Replay(departed, replay.landed, replay.weather, replay.requests)
        self._story = Story(spoiled, defects, list(kill), seed)

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
            return await self._summary(mesh, open_to, outcomes, periods)

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
                if until_us == _micros(TRAINED_FROM):
                    await self._predicted(mesh, outcomes)
                    trained = asyncio.create_task(self._train(mesh, open_to))
            await self._ask(client, trained, held)
        finally:
            if trained is not None:
                trained.cancel()
        month_end_us = _micros(
            datetime(2013 + self._months // 12, self._months % 12 + 1, 1, tzinfo=UTC)
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

    async def _surely(
        self, send: Callable[[str, Any], Awaitable[Any]], kind: str, what: object
    ) -> None:
        """Send, and again while the broker is away; the door drops by its id what was written."""
        deadline = time.monotonic() + _AWAY_S
        while True:
            try:
                await send(kind, what)
            except Retryable as error:
                if time.monotonic() > deadline:
                    raise
                self._out.progress("producer", f"sends again: {error}")
                await asyncio.sleep(error.retry_after)
            else:
                return

    async def _predicted(self, mesh: Mesh, outcomes: Outcomes) -> None:
        asked = self._story.replay.requests.filter(pl.col("occurred_at") < TRAINED_FROM).height
        await Waiting(mesh, self._out.progress).outcomes(outcomes, asked)

    async def _train(self, mesh: Mesh, open_to: Connections) -> None:
        began = time.monotonic()
        known = await training.logged(open_to, TRAINED_FROM)
        self._out.progress("training", f"version 2 on {known.height:,} logged vectors")
        trained = await asyncio.to_thread(training.fit, known)
        training.register(
            mesh, 2, trained.onnx, reference=trained.reference, metrics=trained.metrics
        )
        training.roll_out(mesh, [(1, training.BEGINNING), (2, TRAINED_FROM)])
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

    async def _summary(
        self, mesh: Mesh, open_to: Connections, outcomes: Outcomes, periods: Sequence[str]
    ) -> dict[str, Any]:
        story = self._story
        asked = outcomes.frame.filter(pl.col("tenant_id") != probing.TENANT)
        project = Path(mesh.environment()["CAUSEMESH_PROJECT"])
        config = yaml.safe_load((project / "billing.yaml").read_text())
        expected = checking.expected_totals(config, story.replay, asked, periods)
        books = await asyncio.to_thread(asking.read_books, mesh, periods)
        reasons = await asking.counts(open_to, "ingest.rejects.v1", "reason")
        repeats = await asking.repeats(open_to, story.replay.frames, story.defects)
        dead = await asking.counts(open_to, "mesh.deadletters.v1", "reason")
        recounts = [books.recounts[period]["equal"] for period in periods]
        line = next(
            line
            for invoice in books.invoices
            for line in invoice["lines"]
            if line["meter"] == "predictions" and line["amount_minor"] > 0
        )
        traced = await tracing.trace(self._home, line["line_id"], verify=True)
        checks = [
            checking.every_request_has_one_outcome(story.replay, asked),
            checking.rejects_are_the_defects(reasons, story.defects, repeats),
            checking.invoices_match(books.invoices, expected),
            at_stripe.stripe_holds(books.at_stripe, books.invoices, expected),
            Check("billing's own recount from the log", all(recounts), f"{len(recounts)} months"),
            Check("trace of a line", bool(traced.equal), f"{line['line_id']} recomputed"),
            Check("dead letters", not dead, f"{dead or 'none'}"),
            Check("memory", story.peak_rss_mb <= _MOST_RSS_MB,
                  f"{story.peak_rss_mb:,.0f} MB at most for all services"),
        ]  # fmt: skip
        return {
            "months": self._months,
            "events": story.sent - story.replay.requests.height,
            "requests": story.replay.requests.height,
            "outcomes": dict(asked["outcome"].value_counts().iter_rows()),
            "rejects": {
                "duplicate": reasons.get("duplicate", 0) - repeats.duplicates,
                "missing_tenant": reasons.get("missing_tenant", 0) - repeats.nameless,
            },
            "repeats": vars(repeats),
            "auc": checking.aucs(story.replay, asked),
            "training_auc": story.trained and story.trained.auc,
            "latency": story.probe,
            "seconds": {name: round(value, 1) for name, value in story.seconds.items()},
            "recoveries": story.recoveries,
            "requests_per_second": round(story.replay.requests.height / story.seconds["replay"]),
            "peak_services_rss_mb": round(story.peak_rss_mb),
            "reviews": books.reviews,
            "drift_alerts": books.alerts,
            "invoices": [
                {k: one[k] for k in ("tenant_id", "period", "stripe_id", "total_minor", "currency")}
                for one in books.invoices
            ],
            "trace": traced.document(),
            "digest_predictions": checking.digest_of_predictions(asked),
            "digest_invoices": checking.digest_of_invoices(books.invoices),
            "checks": [vars(check) for check in checks],
            "passed": all(check.passed for check in checks),
        }


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


def show(summary: dict[str, Any], out: Output) -> None:
    """The summary for people."""
    out.rows("AUC against the landed flights", summary["auc"])
    invoices = [
        {**one, "total": f"{one['total_minor'] / 100:,.2f} {one['currency']}"}
        for one in summary["invoices"]
    ]
    for one in invoices:
        del one["total_minor"], one["currency"]
    out.rows("Invoices", invoices)
    names = ("events", "requests", "outcomes", "rejects", "latency", "seconds")
    more = ("requests_per_second", "peak_services_rss_mb", "reviews", "drift_alerts")
    digests = ("digest_predictions", "digest_invoices")
    out.rows("Figures", [{"what": n, "value": str(summary[n])} for n in (*names, *more, *digests)])
    out.rows(
        "Checks",
        [
            {"check": c["name"], "passed": "yes" if c["passed"] else "NO", "detail": c["detail"]}
            for c in summary["checks"]
        ],
    )


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
        show(summary, out)
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
