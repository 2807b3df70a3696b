"""An invoice as the Stripe calls that bring it about; nothing here talks to Stripe.

Two things make a call safe to repeat. Its idempotency key is a function of the invoice, so a retry
within 24 hours gets the first answer. Stripe forgets keys after that (and repeats a saved 500 until
then), so each created object also carries metadata that names it: `lookup` is what to search for
before the call is made again under another key.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Literal

from services.billing.domain.invoicing import Invoice, InvoiceLine
from services.billing.domain.plans import BASE_FEE
from services.billing.domain.rows import MICRO

TENANT_KEY = "causemesh_tenant"
INVOICE_KEY = "causemesh_invoice"
LINE_KEY = "causemesh_line"

Operation = Literal[
    "customers.create", "invoices.create", "invoiceitems.create", "invoices.finalize"
]
Produced = Literal["customer", "invoice"]

_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_DNS, "stripe.billing.causemesh")


@dataclass(frozen=True)
class StripeCall:
    """One call, to be made in its place in the plan.

    `params` are the call's own. `needs` names the parameters (for `invoices.finalize`, the path's)
    that are the Stripe id of what an earlier call produced; `produces` is what this one's id is
    known as. `lookup` is the metadata (key, value) by which an earlier success is found; a
    finalisation has none, the invoice's status tells.
    """

    operation: Operation
    idempotency_key: str
    params: Mapping[str, object]
    needs: tuple[Produced, ...] = ()
    produces: Produced | None = None
    lookup: tuple[str, str] | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)


def plan_calls(invoice: Invoice, days_until_due: int = 30) -> list[StripeCall]:
    """The customer, a draft, one item a line, and the finalisation; none for an empty invoice."""
    if not invoice.lines:
        return []
    return [
        _customer(invoice.tenant_id),
        _draft(invoice, days_until_due),
        *(_item(invoice, line) for line in invoice.lines),
        StripeCall("invoices.finalize", f"{invoice.invoice_id}/finalize", {}, needs=("invoice",)),
    ]


def _customer(tenant: str) -> StripeCall:
    # One key for all the tenant's invoices. Hashed: a key has at most 255 characters.
    return StripeCall(
        "customers.create",
        f"customer/{uuid.uuid5(_NAMESPACE, tenant)}",
        {"name": tenant},
        produces="customer",
        lookup=(TENANT_KEY, tenant),
        metadata={TENANT_KEY: tenant},
    )


def _draft(invoice: Invoice, days_until_due: int) -> StripeCall:
    return StripeCall(
        "invoices.create",
        f"{invoice.invoice_id}/create",
        {
            "currency": invoice.currency,
            "auto_advance": False,
            "collection_method": "send_invoice",
            "days_until_due": days_until_due,
            "pending_invoice_items_behavior": "exclude",
            "description": f"Usage in {invoice.period}",
        },
        needs=("customer",),
        produces="invoice",
        lookup=(INVOICE_KEY, invoice.invoice_id),
        metadata={TENANT_KEY: invoice.tenant_id, INVOICE_KEY: invoice.invoice_id},
    )


def _item(invoice: Invoice, line: InvoiceLine) -> StripeCall:
    return StripeCall(
        "invoiceitems.create",
        f"{invoice.invoice_id}/line/{uuid.uuid5(_NAMESPACE, line.line_id)}",
        {
            "amount": line.amount_minor,
            "currency": invoice.currency,
            "description": _description(invoice, line),
        },
        needs=("customer", "invoice"),
        lookup=(LINE_KEY, line.line_id),
        metadata={
            TENANT_KEY: invoice.tenant_id,
            INVOICE_KEY: invoice.invoice_id,
            LINE_KEY: line.line_id,
        },
    )


def _description(invoice: Invoice, line: InvoiceLine) -> str:
    late = "" if line.usage_period == invoice.period else ", arrived late"
    if line.meter == BASE_FEE:
        return f"Base fee of {line.usage_period}{late}"
    quantity = (Decimal(line.quantity_micro) / MICRO).normalize()
    price = f"{line.unit_price:f} {invoice.currency.upper()}"
    return f"{line.meter} in {line.usage_period}{late}: {quantity:f} at {price} (tier {line.tier})"
