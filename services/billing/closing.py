"""Closes event-time months once the whole group's watermark has passed them and the grace."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import structlog
from opentelemetry.trace import Tracer, get_current_span
from prometheus_client import Counter
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from causemesh.clock import Clock
from causemesh.outbox import add_events
from causemesh.periodic import repeat
from causemesh.positions_sql import SqlPositionStore
from causemesh.spans_sending import Trace, following
from causemesh.sql import database_errors
from services.billing.books import CLOSER, Books, Terms, locked
from services.billing.domain.invoicing import Invoice, close_month
from services.billing.domain.periods import closable_months, month_bounds, month_of
from services.billing.domain.usage import UsageRow, monthly_usage
from services.billing.entitlements import SHARD
from services.billing.events import invoice_recorded
from services.billing.handlers import GROUP
from services.billing.store import UsageStore
from services.billing.tracing import taken_for

_log = structlog.get_logger(__name__)
_CALENDAR_END = "9999-11"  # whatever a record or a watermark says, this month is never closed
_LONGEST_S = 600.0  # a month's invoices are made between two statements


class MonthCloser:
    """Closes months in order; any number of processes may run one, and one works at a time.

    An invoice is a function of the log: of the usage that is due by its month (`lateness`), and of
    what earlier invoices billed.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        store: SqlPositionStore,
        terms: Terms,
        *,
        partitions: int,
        clock: Clock,
        every_s: float,
        outcomes: Counter,
        tracer: Tracer | None = None,
    ) -> None:
        self._engine = engine
        self._store = store
        self._terms = terms
        self._partitions = partitions
        self._clock = clock
        self._every_s = every_s
        self._outcomes = outcomes
        self._tracer = tracer

    async def run(self) -> None:
        """Close until cancelled. Raises Misdeclared when usage and billing.yaml disagree."""
        await repeat("closing", self.close_due, self._clock, self._every_s)

    async def close_due(self) -> int:
        """Close every month that is due; returns how many. Raises Retryable."""
        watermark_us = await self._store.watermark(GROUP, self._partitions)
        if watermark_us is None:
            return 0
        closed = 0
        while await self._close_next(watermark_us):
            closed += 1
        return closed

    async def _close_next(self, watermark_us: int) -> bool:
        """Close the oldest month that is due, in one transaction."""
        now_us = min(watermark_us, month_bounds(_CALENDAR_END)[0])
        async with database_errors(), self._engine.begin() as transaction:
            if not await locked(transaction, CLOSER, _LONGEST_S):
                return False
            found = await UsageStore.due_months(transaction)
            known = [month for month in found if month < _CALENDAR_END]
            opened = set(self._billable(known, now_us)) - await Books.closed(transaction)
            due = closable_months(now_us, self._terms.config.grace_us, opened)
            if due:
                await self._close(transaction, due[0])
        return bool(due)

    def _billable(self, known: Sequence[str], now_us: int) -> Iterable[str]:
        """Months with usage; with tenants who pay without it, also those in between and since."""
        if not known or not self._terms.config.tenants:
            return known
        return _months(known[0], month_of(now_us))

    async def _close(self, transaction: AsyncConnection, period: str) -> None:
        config = self._terms.config
        known = await UsageStore.known_at(transaction, period)
        usage = monthly_usage(known.usage, known.members)
        tenants = sorted({*usage, *config.tenants})
        before = await Books.billed_before(transaction, period, tenants)
        traces = await taken_for(transaction, period)
        closed: list[tuple[Invoice, Sequence[UsageRow]]] = []
        contexts: dict[str, bytes] = {}
        for tenant in tenants:
            rows = usage.get(tenant, [])
            about = {"causemesh.tenant_id": tenant, "causemesh.period": period}
            with following(self._tracer, "close invoice", traces.get(tenant, []), about) as context:
                invoice = close_month(config, tenant, period, rows, before.get(tenant, []))
                if context is not None:
                    contexts[invoice.invoice_id] = context
                    _name_lines(invoice, traces[tenant])
            closed.append((invoice, rows))
        await Books.open_month(transaction, period, self._terms)
        await Books.add(transaction, closed, contexts)
        made = [invoice for invoice, _ in closed if invoice.lines]
        told = [
            invoice_recorded(one, one.lines, "closed", trace=contexts.get(one.invoice_id))
            for one in made
        ]
        await add_events(transaction, told, shard=SHARD)
        self._outcomes.labels("invoice", "closed").inc(len(made))
        _log.info("month_closed", period=period, invoices=len(made))


def _name_lines(invoice: Invoice, traces: Sequence[Trace]) -> None:
    """Say on the span which lines the traced usage is on."""
    usage = {(about["causemesh.meter"], about["causemesh.usage_period"]) for _, about in traces}
    lines = [one.line_id for one in invoice.lines if (one.meter, one.usage_period) in usage]
    span = get_current_span()
    span.set_attribute("causemesh.invoice_id", invoice.invoice_id)
    span.set_attribute("causemesh.line_ids", lines)


def _months(first: str, last: str) -> Iterable[str]:
    month = first
    while month <= last:
        yield month
        month = month_of(month_bounds(month)[1])
