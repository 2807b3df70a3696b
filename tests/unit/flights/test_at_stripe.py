"""The check of what Stripe holds passes on equal books, and on nothing else."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from examples.flights.at_stripe import stripe_holds

Held = list[dict[str, Any]]
INVOICES = [
    {
        "invoice_id": f"i-{tenant}",
        "tenant_id": tenant,
        "period": "2013-01",
        "lines": [{"line_id": f"{tenant}/base", "amount_minor": 2_000},
                  {"line_id": f"{tenant}/tier1", "amount_minor": cents}],
    }
    for tenant, cents in (("UA", 150), ("DL", 0))
]  # fmt: skip
EXPECTED = {("UA", "2013-01"): 2_150, ("DL", "2013-01"): 2_000}


def held() -> Held:
    customers = [
        {"object": "customer", "id": f"cus_{one['tenant_id']}",
         "metadata": {"causemesh_tenant": one["tenant_id"]}}
        for one in INVOICES
    ]  # fmt: skip
    bills = [
        {
            "object": "invoice",
            "id": f"in_{one['tenant_id']}",
            "metadata": {"causemesh_invoice": one["invoice_id"]},
            "status": "open",
            "total": EXPECTED[one["tenant_id"], "2013-01"],
            "items": [
                {"amount": line["amount_minor"], "metadata": {"causemesh_line": line["line_id"]}}
                for line in one["lines"]
            ],
        }
        for one in INVOICES
    ]
    return copy.deepcopy([*customers, *bills])


def test_equal_books_pass() -> None:
    check = stripe_holds(held(), INVOICES, EXPECTED)
    assert check.passed, check.detail


def _cent_more(found: Held) -> None:
    """A wrong line and, with it, a wrong total."""
    found[2]["items"][1]["amount"] += 1
    found[2]["total"] += 1


def _line_twice(found: Held) -> None:
    found[2]["items"].append(found[2]["items"][1])
    found[2]["total"] += 150


@pytest.mark.parametrize(
    "spoil",
    [
        lambda found: found.pop(2),
        lambda found: found.append({**found[2], "id": "in_again"}),
        lambda found: found.append({**found[0], "id": "cus_again"}),
        lambda found: found[2].update(status="draft"),
        lambda found: found[2].update(total=2_151),
        lambda found: found[2]["items"].pop(),
        lambda found: found[2]["metadata"].update(causemesh_invoice="i-unknown"),
        _cent_more,
        _line_twice,
    ],
    ids=["absent", "twice", "customer", "draft", "total", "line", "unknown", "cent", "line_twice"],
)
def test_any_difference_fails(spoil: Callable[[Held], object]) -> None:
    found = held()
    spoil(found)
    assert not stripe_holds(found, INVOICES, EXPECTED).passed


def test_a_recount_that_differs_from_both_fails() -> None:
    assert not stripe_holds(held(), INVOICES, {**EXPECTED, ("UA", "2013-01"): 2_149}).passed
    assert not stripe_holds(held(), INVOICES, {**EXPECTED, ("B6", "2013-01"): 2_000}).passed
