"""What billing tells the mesh about invoices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from causemesh.outbox import Event
from services.billing.books import Head
from services.billing.domain.invoicing import Invoice, InvoiceLine
from services.billing.domain.periods import month_bounds

INVOICES = "billing.invoices.v1"


def invoice_recorded(
    invoice: Invoice | Head,
    lines: Sequence[InvoiceLine],
    status: Literal["closed", "finalised"],
    stripe_id: str | None = None,
    *,
    trace: bytes | None = None,
) -> Event:
    """An invoice's new state; its time is the end of its month, its origin its newest usage.

    `trace` is the W3C context that the event goes on with.
    """
    record = {
        "tenant_id": invoice.tenant_id,
        "occurred_at": month_bounds(invoice.period)[1],
        "invoice_id": invoice.invoice_id,
        "period": invoice.period,
        "status": status,
        "currency": invoice.currency,
        "total_minor": invoice.total_minor,
        "stripe_id": stripe_id,
        "lines": [_line(line) for line in lines],
    }
    return Event(INVOICES, invoice.tenant_id, record, _origin(lines), trace)


def _line(line: InvoiceLine) -> dict[str, object]:
    return {
        "line_id": line.line_id,
        "meter": line.meter,
        "usage_period": line.usage_period,
        "quantity_micro": line.quantity_micro,
        "amount_minor": line.amount_minor,
        "ranges": [vars(span) for span in line.ranges],
    }


def _origin(lines: Sequence[InvoiceLine]) -> tuple[str, int, int] | None:
    spans = [span for line in lines for span in line.ranges]
    if not spans:
        return None
    newest = max(spans, key=lambda span: (span.last, span.topic, span.partition))
    return newest.topic, newest.partition, newest.last
