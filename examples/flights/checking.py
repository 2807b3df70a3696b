"""What must be true at the end of the demo, computed apart from the services that made it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_HALF_EVEN, Decimal
from typing import Any

import numpy as np
import polars as pl
from sklearn.metrics import roc_auc_score

from examples.flights.dataset import Defects, Replay
from examples.flights.model import LABEL

MONTH = "%Y-%m"


@dataclass(frozen=True)
class Check:
    """One line of the summary that can fail."""

    name: str
    passed: bool
    detail: str


def every_request_has_one_outcome(replay: Replay, outcomes: pl.DataFrame) -> Check:
    """Nothing lost, nothing twice: by request id, against what was sent."""
    sent = replay.requests["event_id"]
    found = outcomes["request_id"]
    missing = sent.filter(~sent.is_in(found.implode())).len()
    double = found.len() - found.n_unique()
    others = outcomes.filter(pl.col("outcome") != "predicted")
    failed, why = others.height, others["reason"].drop_nulls().unique().sort().head(3).to_list()
    detail = (
        f"{sent.len():,} requests, {missing} without outcome, {double} twice, {failed} failed"
        f"{f' ({why})' if why else ''}"
    )
    return Check("one outcome a request", missing == double == failed == 0, detail)


def rejects_are_the_defects(
    reasons: Mapping[str, int], defects: Defects, repeats: Defects
) -> Check:
    """The door refused what was spoiled and what the producer had to send again, nothing else."""
    expected = {
        "duplicate": defects.duplicates + repeats.duplicates,
        "missing_tenant": defects.nameless + repeats.nameless,
    }
    expected = {reason: count for reason, count in expected.items() if count}
    return Check("rejects", dict(reasons) == expected, f"{dict(reasons)}, expected {expected}")


def repeats_in(written: Sequence[pl.DataFrame], defects: Defects) -> Defects:
    """What the log of each inbox topic holds more than the producer meant to write: a producer
    whose send failed sends all of it again."""
    named = [frame.filter(pl.col("tenant_id") != "") for frame in written]
    twice = sum(frame.height - frame["event_id"].n_unique() for frame in named)
    nameless = sum(frame.height for frame in written) - sum(frame.height for frame in named)
    return Defects(twice - defects.duplicates, nameless - defects.nameless)


def aucs(replay: Replay, outcomes: pl.DataFrame) -> list[dict[str, Any]]:
    """AUC by month and version, against the flights that landed."""
    labels = replay.landed.select(
        request_id=LABEL["request_id"], positive=pl.sql_expr(LABEL["positive"])
    )
    scored = outcomes.filter(pl.col("score").is_not_null())  # a failed one is another check's
    known = scored.join(labels, on="request_id").with_columns(
        month=pl.col("occurred_at").dt.strftime(MONTH)
    )
    rows = []
    for (month, version), part in known.group_by("month", "version"):
        truth = part["positive"].to_numpy()
        if len(np.unique(truth)) == 2:
            value = float(roc_auc_score(truth, part["score"].to_numpy()))
            row = {"month": str(month), "version": int(str(version)), "flights": part.height}
            rows.append({**row, "auc": round(value, 4)})
    return sorted(rows, key=lambda row: (str(row["month"]), str(row["version"])))


def expected_totals(
    config: Mapping[str, Any], replay: Replay, outcomes: pl.DataFrame, months: Sequence[str]
) -> dict[tuple[str, str], int]:
    """What each airline owes for each month, in minor units, counted from the flights themselves.

    A plain reading of billing.yaml, apart from the billing service: count, cut into tiers, round
    each line half to even.
    """
    departed = replay.departed.filter(pl.col("tenant_id") != "").unique("event_id")
    counts = {
        "predictions": _counts(outcomes.filter(pl.col("outcome") == "predicted")),
        "departures": _counts(departed),
    }
    plan = config["plans"][config["tenants"]["default"]]
    tenants = {tenant for per_meter in counts.values() for tenant, _ in per_meter}
    return {
        (tenant, month): _total(plan, {m: c.get((tenant, month), 0) for m, c in counts.items()})
        for tenant in sorted(tenants)
        for month in months
        if any((tenant, month) in per_meter for per_meter in counts.values())
    }


def _counts(frame: pl.DataFrame) -> dict[tuple[str, str], int]:
    month = pl.col("occurred_at").dt.strftime(MONTH).alias("month")
    grouped = frame.group_by("tenant_id", month).len()
    return {(tenant, month): count for tenant, month, count in grouped.iter_rows()}


def _total(plan: Mapping[str, Any], counts: Mapping[str, int]) -> int:
    total = Decimal(plan["base_fee"]) * 100
    for meter, price in plan["prices"].items():
        left, start = max(counts[meter] - price["included"], 0), 0
        for tier in price["tiers"]:
            room = tier["up_to"] - start if "up_to" in tier else left
            units = min(left, room)
            amount = Decimal(units) * Decimal(tier["unit"]) * 100
            total += amount.quantize(Decimal(1), rounding=ROUND_HALF_EVEN)
            left, start = left - units, start + room
    return int(total)


def invoices_match(
    invoices: Sequence[Mapping[str, Any]], expected: Mapping[tuple[str, str], int]
) -> Check:
    """Every airline has one finalised invoice a month, equal to the recount to the cent."""
    found = {(one["tenant_id"], one["period"]): one["total_minor"] for one in invoices}
    wrong = [key for key in {*found, *expected} if found.get(key) != expected.get(key)]
    open_ones = [one["invoice_id"] for one in invoices if one["status"] != "finalised"]
    unsent = [one["invoice_id"] for one in invoices if not one["stripe_id"]]
    detail = (
        f"{len(found)} invoices, {sum(found.values()) / 100:,.2f} in all; {len(wrong)} differ from"
        f" the recount, {len(open_ones)} not finalised, {len(unsent)} not at Stripe"
    )
    passed = not wrong and not open_ones and not unsent and len(found) == len(invoices) > 0
    return Check("invoices equal a recount", passed, detail)


def digest_of_predictions(outcomes: pl.DataFrame) -> str:
    """One number for all predictions: ids, versions, outcomes, scores and vectors bit for bit."""
    ordered = outcomes.sort("request_id")
    digest = hashlib.sha256()
    for name in ("request_id", "outcome"):
        digest.update("\n".join(ordered[name].to_list()).encode())
    digest.update(ordered["version"].to_numpy().astype("<i4").tobytes())
    digest.update(ordered["score"].fill_null(float("nan")).to_numpy().astype("<f8").tobytes())
    digest.update(b"".join(ordered["vector"].to_list()))
    return digest.hexdigest()[:16]


def digest_of_invoices(invoices: Sequence[Mapping[str, Any]]) -> str:
    """One number for all invoices and their lines; what Stripe calls them is left out."""
    rows = sorted(
        (one["tenant_id"], one["period"], one["currency"], one["total_minor"], line["line_id"],
         line["quantity_micro"], line["amount_minor"])
        for one in invoices
        for line in one["lines"]
    )  # fmt: skip
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]
