"""What a run has come to: its figures and its checks."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
import yaml

from causemesh.cli import tracing
from causemesh.cli.context import Connections
from causemesh.cli.output import Output
from causemesh.local.mesh import Mesh
from examples.flights import asking, at_stripe, checking, model, probing
from examples.flights.checking import Check
from examples.flights.dataset import Defects, Replay
from examples.flights.following import Outcomes

_MOST_RSS_MB = 2_500


@dataclass
class Story:
    """What the demo knows on its way."""

    replay: Replay
    defects: Defects
    kill: list[str]
    seed: int | None
    months: int
    trained: model.Trained | None = None
    probe: dict[str, float] = field(default_factory=dict)
    peak_rss_mb: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    recoveries: list[dict[str, Any]] = field(default_factory=list)

    @property
    def sent(self) -> int:
        """How many records the producer writes."""
        return sum(frame.height for frame in self.replay.frames.values())


async def summary(
    story: Story, mesh: Mesh, open_to: Connections, outcomes: Outcomes, periods: Sequence[str]
) -> dict[str, Any]:
    """The figures, and every check on what the mesh has made of the replay."""
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
    traced = await tracing.trace(mesh.home, line["line_id"], verify=True)
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
        "months": story.months,
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


def show(found: dict[str, Any], out: Output) -> None:
    """The summary for people."""
    out.rows("AUC against the landed flights", found["auc"])
    invoices = [
        {**one, "total": f"{one['total_minor'] / 100:,.2f} {one['currency']}"}
        for one in found["invoices"]
    ]
    for one in invoices:
        del one["total_minor"], one["currency"]
    out.rows("Invoices", invoices)
    names = ("events", "requests", "outcomes", "rejects", "latency", "seconds")
    more = ("requests_per_second", "peak_services_rss_mb", "reviews", "drift_alerts")
    digests = ("digest_predictions", "digest_invoices")
    out.rows("Figures", [{"what": n, "value": str(found[n])} for n in (*names, *more, *digests)])
    out.rows(
        "Checks",
        [
            {"check": c["name"], "passed": "yes" if c["passed"] else "NO", "detail": c["detail"]}
            for c in found["checks"]
        ],
    )
