"""What the books say, as metrics: money, invoices by state, usage that is on no invoice yet.

Labels are bounded: states, currencies and meters, never tenants. The numbers are read from the
database, so every instance tells the same ones: take the maximum over instances, not the sum.
"""

from __future__ import annotations

import sqlalchemy as sa
from prometheus_client import CollectorRegistry, Gauge
from sqlalchemy.ext.asyncio import AsyncEngine

from causemesh.clock import Clock
from causemesh.periodic import repeat
from causemesh.sql import database_errors

STATUSES = ("closed", "finalised", "mismatch")
_INVOICES = sa.text(
    "SELECT currency, status, count(*), CAST(sum(total_minor) AS bigint)"
    " FROM invoices GROUP BY currency, status"
)
# Months close in order: what is due after the last closed one is on no invoice yet.
_UNBILLED = sa.text(
    """
    SELECT meter, CASE WHEN usage_period = due_period THEN 'in_time' ELSE 'late' END, count(*)
    FROM usage_buckets
    WHERE due_period > coalesce((SELECT max(period) FROM closed_months), '')
    GROUP BY 1, 2
    """
)


class BillingMetrics:
    """The gauges, in a service's registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.invoices = Gauge(
            "causemesh_billing_invoices",
            "Invoices by state; a mismatch is one where Stripe's books differ from ours.",
            ("status",),
            registry=registry,
        )
        self.invoiced_minor = Gauge(
            "causemesh_billing_invoiced_minor",
            "Totals of all invoices by state, minor units of the currency.",
            ("currency", "status"),
            registry=registry,
        )
        self.unbilled = Gauge(
            "causemesh_billing_unbilled_buckets",
            "Hourly usage buckets of months that are not closed; late ones came after theirs was.",
            ("meter", "kind"),
            registry=registry,
        )


class Reporter:
    """Counts the books now and then."""

    def __init__(
        self, engine: AsyncEngine, metrics: BillingMetrics, *, clock: Clock, every_s: float
    ) -> None:
        self._engine = engine
        self._metrics = metrics
        self._clock = clock
        self._every_s = every_s

    async def run(self) -> None:
        """Report until cancelled."""
        await repeat("reporting", self.report, self._clock, self._every_s)

    async def report(self) -> None:
        """Count once. Raises Retryable."""
        async with database_errors(), self._engine.connect() as connection:
            invoices = (await connection.execute(_INVOICES)).all()
            unbilled = (await connection.execute(_UNBILLED)).all()
        metrics = self._metrics
        # Nothing is awaited from here on, so no scrape sees half of it.
        metrics.invoiced_minor.clear()
        metrics.unbilled.clear()
        counts = dict.fromkeys(STATUSES, 0)
        for currency, status, count, total_minor in invoices:
            counts[status] = counts.get(status, 0) + count
            metrics.invoiced_minor.labels(currency, status).set(total_minor)
        for status, count in counts.items():
            metrics.invoices.labels(status).set(count)
        for meter, kind, count in unbilled:
            metrics.unbilled.labels(meter, kind).set(count)
