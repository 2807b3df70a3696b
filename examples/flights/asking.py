"""What the mesh and Stripe say at the end of the demo: over their APIs, and in the log."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from causemesh.cli.context import Connections
from causemesh.local.mesh import Mesh
from examples.flights import at_stripe, checking, probing
from examples.flights.dataset import Defects


@dataclass
class Books:
    """What billing, Stripe, drift and agents say over their APIs."""

    invoices: list[dict[str, Any]]
    at_stripe: list[dict[str, Any]]
    recounts: dict[str, dict[str, Any]]
    alerts: dict[str, int]
    reviews: dict[str, int]


def read_books(mesh: Mesh, periods: Sequence[str]) -> Books:
    """Ask them, with a recount of each month."""
    with mesh.client("billing") as api:
        heads = list(probing.pages(api, "/v1/invoices"))
        invoices = [api.get(f"/v1/invoices/{one['invoice_id']}").json() for one in heads]
        recounts = {
            period: api.post("/v1/recount", params={"period": period}, timeout=300.0).json()
            for period in periods
        }
    stripe_url = mesh.environment().get("CAUSEMESH_STRIPE_URL", at_stripe.STRIPE)
    key = os.environ.get("CAUSEMESH_STRIPE_KEY", at_stripe.STAND_IN_KEY)
    held = at_stripe.held_by(stripe_url, key)
    alerts: dict[str, int] = {}
    with mesh.client("drift") as api:
        for one in probing.pages(api, "/v1/alerts"):
            alerts[one["detector"]] = alerts.get(one["detector"], 0) + 1
    reviews: dict[str, int] = {}
    with mesh.client("agents") as api:
        for one in probing.pages(api, "/v1/reviews"):
            if one["tenant_id"] != probing.TENANT:
                reviews[one["status"]] = reviews.get(one["status"], 0) + 1
    return Books(invoices, held, recounts, alerts, reviews)


async def counts(open_to: Connections, topic: str, column: str) -> dict[str, int]:
    """How often each value of a column stands in a topic."""
    found: dict[str, int] = {}
    async for batch in open_to.log.read(await open_to.log.ends([topic])):
        for value in batch.frame[column]:
            found[value] = found.get(value, 0) + 1
    return found


async def repeats(open_to: Connections, kinds: Iterable[str], defects: Defects) -> Defects:
    """What the inbox topics of `kinds` hold beyond the `defects` that were put in."""
    written = []
    for kind in kinds:
        ends = await open_to.log.ends([f"inbox.{kind}"])
        ids = [b.frame.select("event_id", "tenant_id") async for b in open_to.log.read(ends)]
        written.append(pl.concat(ids))
    return checking.repeats_in(written, defects)
