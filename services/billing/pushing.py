"""Brings closed invoices to Stripe: each exactly once, whatever fails and whoever is killed.

Nothing here remembers what was begun. Every try looks at Stripe first (lists are never behind) and
goes on from what is there: no draft, a draft with some of its lines, a finalised invoice. Between
two tries the idempotency keys hold; a key whose kept answer is an error is replaced by the next.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import sqlalchemy as sa
import structlog
from opentelemetry.trace import SpanKind, Tracer
from prometheus_client import Counter
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncEngine

from causemesh.clock import Clock
from causemesh.errors import Retryable
from causemesh.faultpoints import Point, reach
from causemesh.outbox import add_events
from causemesh.periodic import repeat
from causemesh.spans_sending import Trace, following
from causemesh.sql import database_errors
from services.billing.books import PUSHER, Books, Head, locked
from services.billing.domain.invoicing import Invoice, InvoiceLine
from services.billing.domain.stripe_calls import StripeCall, plan_calls
from services.billing.entitlements import SHARD
from services.billing.events import invoice_recorded
from services.billing.gateways import Bill, Item, NotTaken, Payments, SpentKey
from services.billing.tables import customers, invoices

_log = structlog.get_logger(__name__)
_AT_ONCE = 4
_PASS_INVOICES = 500
_LONGEST_WAIT_S = 60.0


class Mismatch(NotTaken):
    """Stripe has something else than the invoice says; a person must look."""


@dataclass
class _Waiting:
    """A tenant whose last try failed."""

    failures: int
    until: float


class Pusher:
    """Pushes closed invoices; any number of processes may run one, and one works at a time."""

    def __init__(
        self,
        engine: AsyncEngine,
        books: Books,
        payments: Payments,
        *,
        clock: Clock,
        every_s: float,
        outcomes: Counter,
        tracer: Tracer | None = None,
    ) -> None:
        self._engine = engine
        self._books = books
        self._payments = payments
        self._clock = clock
        self._every_s = every_s
        self._outcomes = outcomes
        self._tracer = tracer
        self._waiting: dict[str, _Waiting] = {}

    async def run(self) -> None:
        """Push until cancelled."""
        await repeat("pushing", self.push_due, self._clock, self._every_s)

    async def push_due(self) -> int:
        """Push what waits; returns how many invoices were finalised. Raises Retryable."""
        async with database_errors(), self._engine.begin() as holder:
            # None: a pusher that is frozen may go on with a call, so no other may take its place
            if not await locked(holder, PUSHER, None):
                return 0
            heads = await self._books.unpushed(_PASS_INVOICES)
            by_tenant = sorted(heads, key=lambda head: (head.tenant_id, head.period))
            now = self._clock.monotonic()
            due = [
                (tenant, list(owed))
                for tenant, owed in groupby(by_tenant, key=lambda head: head.tenant_id)
                if tenant not in self._waiting or self._waiting[tenant].until <= now
            ]
            gate = asyncio.Semaphore(_AT_ONCE)
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._tenant(gate, *one)) for one in due]
        return sum(task.result() for task in tasks)

    async def _tenant(self, gate: asyncio.Semaphore, tenant: str, heads: Sequence[Head]) -> int:
        """One tenant's invoices in order of their months; what fails waits with all behind it."""
        pushed = 0
        async with gate:
            try:
                lines = await self._books.lines_of(head.invoice_id for head in heads)
                owed = [(head, _invoice(head, lines[head.invoice_id])) for head in heads]
                customer = await self._customer(tenant, plan_calls(owed[0][1])[0])
                bills = {bill.invoice_id: bill for bill in await self._payments.bills_of(customer)}
                for head, invoice in owed:
                    found = bills.get(head.invoice_id)
                    pushed += await self._invoice(head, invoice, customer, found)
            except Retryable as error:
                self._wait(tenant, error)
            except NotTaken as error:  # no customer, so none of the invoices
                for head in heads:
                    await self._note_mismatch(head, error)
            else:
                self._waiting.pop(tenant, None)
        return pushed

    def _wait(self, tenant: str, error: Retryable) -> None:
        failures = self._waiting[tenant].failures + 1 if tenant in self._waiting else 1
        wait_s = min(max(error.retry_after, 0.1 * 2**failures), _LONGEST_WAIT_S)
        self._waiting[tenant] = _Waiting(failures, self._clock.monotonic() + wait_s)
        self._outcomes.labels("push", "retried").inc()
        _log.warning("push_waits", tenant=tenant, reason=str(error), wait_s=wait_s)

    async def _customer(self, tenant: str, call: StripeCall) -> str:
        """The tenant's customer at Stripe; found before it is created."""
        query = sa.select(customers.c.stripe_id, customers.c.attempt)
        async with database_errors(), self._engine.connect() as connection:
            found = await connection.execute(query.where(customers.c.tenant_id == tenant))
            row = found.one_or_none()
        if row is not None and row.stripe_id is not None:
            return str(row.stripe_id)
        attempt = 0 if row is None else row.attempt
        stripe_id = await self._payments.customer_of(tenant)
        if stripe_id is None:
            try:
                stripe_id = await self._payments.make(call, {}, _key(call, attempt))
            except SpentKey:
                await self._note_customer(tenant, None, attempt + 1)
                raise
        await self._note_customer(tenant, stripe_id, attempt)
        return stripe_id

    async def _note_customer(self, tenant: str, stripe_id: str | None, attempt: int) -> None:
        values = {"stripe_id": stripe_id, "attempt": attempt}
        note = insert(customers).values(tenant_id=tenant, **values)
        async with database_errors(), self._engine.begin() as transaction:
            await transaction.execute(
                note.on_conflict_do_update(index_elements=["tenant_id"], set_=values)
            )

    async def _invoice(
        self, head: Head, invoice: Invoice, customer: str, found: Bill | None
    ) -> bool:
        """Whether the invoice was finalised. Raises Retryable."""
        traces: list[Trace] = [(head.traceparent.encode(), {})] if head.traceparent else []
        about = {"causemesh.invoice_id": head.invoice_id, "peer.service": "stripe"}
        try:
            with following(
                self._tracer, "push invoice", traces, about, kind=SpanKind.CLIENT
            ) as context:
                bill = await self._brought(invoice, head.attempt, customer, found)
        except SpentKey:
            await self._note(head, attempt=head.attempt + 1)
            raise
        except NotTaken as error:
            await self._note_mismatch(head, error)
            return False
        return await self._finalised(head, invoice, bill, context)

    async def _brought(
        self, invoice: Invoice, attempt: int, customer: str, found: Bill | None
    ) -> Bill:
        """The finalised invoice at Stripe, from whatever is there of it."""
        _, draft, *items, finalisation = plan_calls(invoice)
        ids = {"customer": customer}
        there: list[Item] = []
        if found is None:
            ids["invoice"] = await self._payments.make(draft, ids, _key(draft, attempt))
        else:
            ids["invoice"] = found.stripe_id
            there = await self._payments.items_of(found.stripe_id)
        bill = found
        if bill is None or bill.status == "draft":
            known = {item.line_id for item in there}
            for call in items:
                if call.lookup is not None and call.lookup[1] not in known:
                    await self._payments.make(call, ids, _key(call, attempt))
            # A finalised invoice never changes, so what is wrong must be seen before.
            _compare(invoice, await self._payments.items_of(ids["invoice"]))
            key = _key(finalisation, attempt)
            bill = await self._payments.finalise(finalisation, ids["invoice"], key)
        if bill.total_minor != invoice.total_minor or bill.status in {"draft", "void"}:
            raise Mismatch(
                f"Stripe's {bill.stripe_id} is {bill.status} with a total of {bill.total_minor},"
                f" the invoice's is {invoice.total_minor}"
            )
        return bill

    async def _finalised(
        self, head: Head, invoice: Invoice, bill: Bill, trace: bytes | None
    ) -> bool:
        """Note that Stripe has it, with the event about it, once."""
        update = (
            sa.update(invoices)
            .where(invoices.c.invoice_id == head.invoice_id, invoices.c.status == "closed")
            .values(status="finalised", stripe_id=bill.stripe_id, problem=None)
        )
        async with database_errors(), self._engine.begin() as transaction:
            if (await transaction.execute(update)).rowcount != 1:
                return False
            event = invoice_recorded(
                invoice, invoice.lines, "finalised", bill.stripe_id, trace=trace
            )
            await add_events(transaction, [event], shard=SHARD)
        reach(Point.BILLING_NOTED)
        self._outcomes.labels("invoice", "finalised").inc()
        return True

    async def _note_mismatch(self, head: Head, error: NotTaken) -> None:
        _log.error("invoice_mismatch", invoice_id=head.invoice_id, reason=str(error))
        self._outcomes.labels("push", "mismatch").inc()
        await self._note(head, status="mismatch", problem=str(error))

    async def _note(self, head: Head, **values: object) -> None:
        update = sa.update(invoices).where(invoices.c.invoice_id == head.invoice_id)
        async with database_errors(), self._engine.begin() as transaction:
            await transaction.execute(update.values(**values))


def _key(call: StripeCall, attempt: int) -> str:
    return f"{call.idempotency_key}/{attempt}" if attempt else call.idempotency_key


def _compare(invoice: Invoice, items: Sequence[Item]) -> None:
    """Raises Mismatch when the draft does not hold every line once and nothing else."""
    expected = sorted((line.line_id, line.amount_minor) for line in invoice.lines)
    found = sorted((item.line_id or "", item.amount_minor) for item in items)
    if found != expected:
        raise Mismatch(
            f"the draft at Stripe has {len(found)} lines of {sum(one for _, one in found)} in all,"
            f" the invoice {len(expected)} of {invoice.total_minor}; it was not finalised"
        )


def _invoice(head: Head, lines: Sequence[InvoiceLine]) -> Invoice:
    return Invoice(head.invoice_id, head.tenant_id, head.period, head.currency, tuple(lines), ())
