"""What Stripe itself holds at the end, asked of it and not of billing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import httpx

from examples.flights.checking import Check

STRIPE, STAND_IN_KEY = "https://api.stripe.com", "sk_test_demo"
_TENANT, _INVOICE, _LINE = "causemesh_tenant", "causemesh_invoice", "causemesh_line"


def held_by(url: str, key: str) -> list[dict[str, Any]]:
    """Every invoice that billing made there, with its items under `items`, and every customer.

    Invoices and customers are told apart by `object`, as Stripe does.
    """
    found = []
    bearer = {"Authorization": f"Bearer {key}"}
    with httpx.Client(base_url=url, headers=bearer, timeout=30.0) as api:
        for customer in _pages(api, "/v1/customers"):
            if _TENANT in customer["metadata"]:
                found.append(customer)
        for invoice in _pages(api, "/v1/invoices"):
            if _INVOICE in invoice["metadata"]:
                items = list(_pages(api, "/v1/invoiceitems", invoice=invoice["id"]))
                found.append({**invoice, "items": items})
    return found


def _pages(api: httpx.Client, path: str, **params: str) -> Iterator[dict[str, Any]]:
    asked: dict[str, Any] = {**params, "limit": 100}
    while True:
        page = api.get(path, params=asked).raise_for_status().json()
        yield from page["data"]
        if not page["has_more"]:
            return
        asked["starting_after"] = page["data"][-1]["id"]


def stripe_holds(
    held: Sequence[Mapping[str, Any]],
    invoices: Sequence[Mapping[str, Any]],
    expected: Mapping[tuple[str, str], int],
) -> Check:
    """Stripe has one customer a tenant, and of each invoice one, final, with the total of the
    recount and each line once; nothing beside them."""
    customers = Counter(one["metadata"][_TENANT] for one in held if one["object"] == "customer")
    there = [one for one in held if one["object"] == "invoice"]
    ours = {one["invoice_id"]: one for one in invoices}
    count = Counter(one["metadata"][_INVOICE] for one in there)
    wrong = [one["id"] for one in there if not _agrees(one, ours, expected)]
    twice = [name for name, times in (customers + count).items() if times > 1]
    absent = ours.keys() - count.keys()
    total = sum(one["total"] for one in there)
    detail = (
        f"{len(there)} invoices, {total / 100:,.2f} in all; {len(wrong)} wrong, {len(twice)} twice,"
        f" {len(absent)} absent"
    )
    passed = not wrong and not twice and not absent and total == sum(expected.values())
    return Check("Stripe's invoices equal the recount", passed, detail)


def _agrees(
    there: Mapping[str, Any],
    ours: Mapping[str, Mapping[str, Any]],
    expected: Mapping[tuple[str, str], int],
) -> bool:
    invoice = ours.get(there["metadata"][_INVOICE])
    if invoice is None or there["status"] not in {"open", "paid"}:
        return False
    items = sorted((one["metadata"].get(_LINE, ""), one["amount"]) for one in there["items"])
    lines = sorted((one["line_id"], one["amount_minor"]) for one in invoice["lines"])
    owed = expected.get((invoice["tenant_id"], invoice["period"]))
    return items == lines and there["total"] == owed == sum(amount for _, amount in items)
