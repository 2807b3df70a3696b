"""Closed months: invoices, their lines, the ledger, and the terms they were closed on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from causemesh.sql import database_errors, idle_for
from services.billing.domain.invoicing import Billed, Invoice, InvoiceLine, ledger_entries
from services.billing.domain.plans import BillingConfig, parse_billing
from services.billing.domain.usage import PositionRange, UsageRow
from services.billing.tables import (
    billed,
    closed_months,
    closed_usage,
    invoices,
    ledger,
    lines,
    terms,
)

_LOCK = sa.text("SELECT pg_try_advisory_xact_lock(:key)")
CLOSER = 0x62696C6C  # any number that every instance agrees on
PUSHER = 0x70757368


@dataclass(frozen=True)
class Terms:
    """A billing.yaml: as it was read, and as it is understood."""

    document: Mapping[str, Any]
    config: BillingConfig

    @classmethod
    def read(cls, document: Mapping[str, Any]) -> Terms:
        """Raises Misdeclared."""
        return cls(document, parse_billing(document))

    @property
    def digest(self) -> str:
        """Tells terms apart."""
        return hashlib.sha256(json.dumps(self.document).encode()).hexdigest()


@dataclass(frozen=True)
class Head:
    """An invoice without its lines; see the table."""

    invoice_id: str
    tenant_id: str
    period: str
    currency: str
    total_minor: int
    status: str
    stripe_id: str | None
    problem: str | None
    attempt: int
    traceparent: str | None


@dataclass(frozen=True)
class InvoiceFilter:
    """Which invoices are asked for; None means any. `after` is the last (period, tenant) seen."""

    tenant_id: str | None = None
    period: str | None = None
    status: str | None = None
    after: tuple[str, str] | None = None


async def locked(transaction: AsyncConnection, key: int, limit_s: float | None) -> bool:
    """Whether this transaction is the one at this work; it is until it ends, or is idle so long."""
    await idle_for(transaction, limit_s)
    return bool((await transaction.execute(_LOCK, {"key": key})).scalar_one())


class Books:
    """What is closed never changes, but for an invoice's state at Stripe."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    @staticmethod
    async def closed(transaction: AsyncConnection) -> set[str]:
        """The closed months."""
        return set((await transaction.execute(sa.select(closed_months.c.period))).scalars())

    @staticmethod
    async def billed_before(
        transaction: AsyncConnection, period: str, tenants: Sequence[str] | None = None
    ) -> dict[str, list[Billed]]:
        """What months before `period` billed of each tenant, summed up."""
        columns = billed.c
        quantity = sa.cast(sa.func.sum(columns.quantity_micro), sa.BigInteger)
        query = (
            sa.select(columns.tenant_id, columns.meter, columns.usage_period, quantity)
            .where(columns.period < period)
            .group_by(columns.tenant_id, columns.meter, columns.usage_period)
        )
        if tenants is not None:
            query = query.where(columns.tenant_id.in_(tenants))
        found: dict[str, list[Billed]] = {}
        for tenant, *part in await transaction.execute(query):
            found.setdefault(tenant, []).append(Billed(*part))
        return found

    @staticmethod
    async def open_month(transaction: AsyncConnection, period: str, on: Terms) -> None:
        """Note that `period` is closed on these terms; first of a close's writes."""
        known = insert(terms).values(digest=on.digest, document=on.document)
        await transaction.execute(known.on_conflict_do_nothing())
        await transaction.execute(sa.insert(closed_months).values(period=period, terms=on.digest))

    @staticmethod
    async def add(
        transaction: AsyncConnection,
        closed: Sequence[tuple[Invoice, Sequence[UsageRow]]],
        traces: Mapping[str, bytes] | None = None,
    ) -> None:
        """Add a month's invoices, each with the usage it was made from.

        Without lines nothing is owed: then only the usage and what is billed of it are kept.
        `traces` are W3C trace contexts by invoice id.
        """
        traced = traces or {}
        made = [invoice for invoice, _ in closed]
        owed = [invoice for invoice in made if invoice.lines]
        entries = {invoice.invoice_id: ledger_entries(invoice) for invoice in owed}
        rows: list[tuple[sa.Table, list[dict[str, Any]]]] = [
            (closed_usage, [_used(i, row) for i, used in closed for row in used]),
            (billed, [_of(invoice, **vars(one)) for invoice in made for one in invoice.billed]),
            (invoices, [_head(one, traced.get(one.invoice_id)) for one in owed]),
            (lines, [row for invoice in owed for row in _lines(invoice)]),
            (ledger, [_of(i, **vars(one)) for i in owed for one in entries[i.invoice_id]]),
        ]
        for table, values in rows:
            if values:
                await transaction.execute(sa.insert(table), values)

    async def terms_of(self, period: str) -> Terms | None:
        """What `period` was closed on; None while it is open. Raises Retryable."""
        query = sa.select(terms.c.document).join(closed_months)
        async with database_errors(), self._engine.connect() as connection:
            found = await connection.execute(query.where(closed_months.c.period == period))
            document = found.scalar_one_or_none()
        return None if document is None else Terms.read(document)

    async def usage_of(self, period: str) -> dict[str, list[UsageRow]]:
        """The usage that `period` was closed on, by tenant. Raises Retryable."""
        columns = closed_usage.c
        query = (
            sa.select(closed_usage)
            .where(columns.period == period)
            .order_by(columns.tenant_id, columns.meter, columns.usage_period)
        )
        found: dict[str, list[UsageRow]] = {}
        async with database_errors(), self._engine.connect() as connection:
            for row in await connection.execute(query):
                used = UsageRow(row.meter, row.usage_period, row.quantity_micro, _spans(row.ranges))
                found.setdefault(row.tenant_id, []).append(used)
        return found

    async def billed_of(self, period: str, tenants: Sequence[str]) -> dict[str, list[Billed]]:
        """`billed_before` on a connection of its own. Raises Retryable."""
        async with database_errors(), self._engine.connect() as connection:
            return await self.billed_before(connection, period, tenants)

    async def page(self, wanted: InvoiceFilter, limit: int) -> list[Head]:
        """Invoices, newest month first. Raises Retryable."""
        columns = invoices.c
        query = sa.select(invoices).order_by(columns.period.desc(), columns.tenant_id.desc())
        for name in ("tenant_id", "period", "status"):
            value = getattr(wanted, name)
            if value is not None:
                query = query.where(columns[name] == value)
        if wanted.after is not None:
            query = query.where(sa.tuple_(columns.period, columns.tenant_id) < wanted.after)
        return await self._heads(query.limit(limit))

    async def unpushed(self, limit: int) -> list[Head]:
        """Invoices that Stripe does not have yet, oldest month first. Raises Retryable."""
        columns = invoices.c
        query = sa.select(invoices).where(columns.status == "closed")
        return await self._heads(query.order_by(columns.period, columns.tenant_id).limit(limit))

    async def of_month(self, period: str) -> list[Head]:
        """All invoices of a month. Raises Retryable."""
        return await self._heads(sa.select(invoices).where(invoices.c.period == period))

    async def head(self, invoice_id: str) -> Head | None:
        """One invoice. Raises Retryable."""
        query = sa.select(invoices).where(invoices.c.invoice_id == invoice_id)
        return next(iter(await self._heads(query)), None)

    async def retry(self, invoice_id: str) -> bool:
        """Let a mismatch be pushed again, under other keys. False if it is none; Retryable."""
        columns = invoices.c
        update = (
            sa.update(invoices)
            .where(columns.invoice_id == invoice_id, columns.status == "mismatch")
            .values(status="closed", problem=None, attempt=columns.attempt + 1)
        )
        async with database_errors(), self._engine.begin() as transaction:
            return (await transaction.execute(update)).rowcount == 1

    async def line(self, line_id: str) -> tuple[Head, InvoiceLine] | None:
        """One line, and its invoice. Raises Retryable."""
        query = sa.select(lines).where(lines.c.line_id == line_id)
        async with database_errors(), self._engine.connect() as connection:
            row = (await connection.execute(query)).one_or_none()
        head = None if row is None else await self.head(row.invoice_id)
        return None if head is None else (head, _line(row))

    async def lines_of(self, invoice_ids: Iterable[str]) -> dict[str, list[InvoiceLine]]:
        """The lines of invoices, in order. Raises Retryable."""
        columns = lines.c
        query = sa.select(lines).where(columns.invoice_id.in_(list(invoice_ids)))
        found: dict[str, list[InvoiceLine]] = {}
        async with database_errors(), self._engine.connect() as connection:
            ordered = query.order_by(columns.invoice_id, columns.number)
            for row in await connection.execute(ordered):
                found.setdefault(row.invoice_id, []).append(_line(row))
        return found

    async def entries(
        self, tenant: str | None, after: Sequence[Any] | None, limit: int
    ) -> list[dict[str, Any]]:
        """Ledger entries by month, line and account. Raises Retryable."""
        key = [ledger.c.period, ledger.c.line_id, ledger.c.account]
        query = sa.select(ledger).order_by(*key).limit(limit)
        if tenant is not None:
            query = query.where(ledger.c.tenant_id == tenant)
        if after is not None:
            query = query.where(sa.tuple_(*key) > sa.tuple_(*after))
        async with database_errors(), self._engine.connect() as connection:
            return [dict(row) for row in (await connection.execute(query)).mappings()]

    async def _heads(self, query: sa.Select[Any]) -> list[Head]:
        async with database_errors(), self._engine.connect() as connection:
            return [Head(**row) for row in (await connection.execute(query)).mappings()]


def _of(invoice: Invoice, **columns: Any) -> dict[str, Any]:
    return {"tenant_id": invoice.tenant_id, "period": invoice.period, **columns}


def _used(invoice: Invoice, used: UsageRow) -> dict[str, Any]:
    return _of(
        invoice,
        meter=used.meter,
        usage_period=used.usage_period,
        quantity_micro=used.quantity_micro,
        ranges=_ranges(used.ranges),
    )


def _head(invoice: Invoice, trace: bytes | None) -> dict[str, Any]:
    return _of(
        invoice,
        invoice_id=invoice.invoice_id,
        currency=invoice.currency,
        total_minor=invoice.total_minor,
        status="closed",
        traceparent=None if trace is None else trace.decode("ascii", "replace"),
    )


def _lines(invoice: Invoice) -> list[dict[str, Any]]:
    return [
        {
            **vars(line),
            "invoice_id": invoice.invoice_id,
            "number": number,
            "unit_price": str(line.unit_price),
            "ranges": _ranges(line.ranges),
        }
        for number, line in enumerate(invoice.lines)
    ]


def _ranges(spans: Iterable[PositionRange]) -> list[list[Any]]:
    return [[span.topic, span.partition, span.first, span.last] for span in spans]


def _spans(ranges: Iterable[Sequence[Any]]) -> tuple[PositionRange, ...]:
    return tuple(PositionRange(*one) for one in ranges)


def _line(row: Any) -> InvoiceLine:
    return InvoiceLine(
        row.line_id,
        row.meter,
        row.usage_period,
        row.tier,
        row.quantity_micro,
        Decimal(row.unit_price),
        row.amount_minor,
        _spans(row.ranges),
    )
