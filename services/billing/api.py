"""The admin API of billing: invoices, usage, plans, the ledger, and proofs from the log."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query
from pydantic import BaseModel

from causemesh.admin import Page, PageParams, Problem, failures, page_of
from services.billing.books import Books, Head, InvoiceFilter
from services.billing.domain.invoicing import InvoiceLine
from services.billing.domain.plans import BillingConfig
from services.billing.domain.rows import MICRO
from services.billing.proofs import Proof, Proofs, Recount
from services.billing.store import HourlyUsage, UsageStore

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_PERIOD = r"^\d{4}-(0[1-9]|1[0-2])$"
_TEXT = r"^[^\x00]*$"  # Postgres has no zero character in text
_Paged = Annotated[PageParams, Depends()]
_Name = Annotated[str | None, Query(pattern=_TEXT)]
_Month = Annotated[str | None, Query(pattern=_PERIOD)]
Status = Literal["closed", "finalised", "mismatch"]


class SpanAnswer(BaseModel):
    """Positions `first` to `last` of a partition, both included."""

    topic: str
    partition: int
    first: int
    last: int


class InvoiceAnswer(BaseModel):
    """An invoice; amounts in minor units. `problem` says what a person must look at."""

    invoice_id: str
    tenant_id: str
    period: str
    status: Status
    currency: str
    total_minor: int
    stripe_id: str | None
    problem: str | None


class LineAnswer(BaseModel):
    """A line of an invoice; `quantity` is in units, `tier` 0 the base fee."""

    line_id: str
    meter: str
    usage_period: str
    tier: int
    quantity: float
    quantity_micro: int
    unit_price: str
    amount_minor: int
    ranges: list[SpanAnswer]


class InvoiceWithLines(InvoiceAnswer):
    """An invoice and its lines in order."""

    lines: list[LineAnswer]


class LineInFull(LineAnswer):
    """A line with what it takes to find its records in the log; a base fee has none."""

    invoice_id: str
    stripe_id: str | None
    tenant_id: str
    currency: str
    topic: str | None
    filter: str | None


class UsageHour(BaseModel):
    """What a tenant used of a meter in one hour of event time."""

    tenant_id: str
    meter: str
    aggregation: str
    hour: datetime
    quantity: float
    quantity_micro: int


class LedgerEntry(BaseModel):
    """One side of a double entry: debits positive, credits negative, in minor units."""

    period: str
    line_id: str
    account: str
    tenant_id: str
    currency: str
    amount_minor: int


class Plans(BaseModel):
    """The billing.yaml in force."""

    currency: str
    grace_hours: float
    meters: dict[str, dict[str, str | None]]
    plans: dict[str, dict[str, Any]]
    tenants: dict[str, str]


def routes(books: Books, usage: UsageStore, proofs: Proofs, config: BillingConfig) -> APIRouter:
    """All routes, bound to their connections."""
    api = APIRouter()
    _invoice_routes(api, books)
    _usage_routes(api, usage, config)
    _proof_routes(api, books, proofs)
    return api


def _invoice_routes(api: APIRouter, books: Books) -> None:
    async def known(invoice_id: str) -> Head:
        head = await books.head(_text(invoice_id))
        if head is None:
            raise Problem(404, "not_found", f"there is no invoice {invoice_id}")
        return head

    @api.get("/invoices", tags=["invoices"])
    async def list_invoices(
        page: _Paged,
        tenant_id: _Name = None,
        period: _Month = None,
        status: Status | None = None,
    ) -> Page[InvoiceAnswer]:
        """Invoices, newest month first."""
        after = _key(page.after, 2)
        wanted = InvoiceFilter(tenant_id, period, status, after and (after[0], after[1]))
        found = await books.page(wanted, page.limit + 1)
        shown = page_of(found, page.limit, lambda head: [head.period, head.tenant_id])
        answers = [InvoiceAnswer.model_validate(asdict(head)) for head in shown.items]
        return Page(items=answers, next_cursor=shown.next_cursor)

    @api.get("/invoices/{invoice_id}", tags=["invoices"], responses=failures(404))
    async def get_invoice(invoice_id: str) -> InvoiceWithLines:
        """One invoice with its lines."""
        head = await known(invoice_id)
        lines = (await books.lines_of([head.invoice_id])).get(head.invoice_id, [])
        return InvoiceWithLines(**asdict(head), lines=[_line(line) for line in lines])

    @api.post("/invoices/{invoice_id}/retry", tags=["invoices"], responses=failures(404, 409))
    async def retry_invoice(invoice_id: str) -> InvoiceAnswer:
        """Push a mismatch once more, after a person has put it right at Stripe."""
        head = await known(invoice_id)
        if not await books.retry(head.invoice_id):
            raise Problem(409, "no_mismatch", f"the invoice is {head.status}; only a mismatch can")
        return InvoiceAnswer.model_validate(asdict(await known(invoice_id)))

    @api.get("/ledger", tags=["invoices"])
    async def list_ledger(page: _Paged, tenant_id: _Name = None) -> Page[LedgerEntry]:
        """Ledger entries, oldest month first; each line's two sum to zero."""
        found = await books.entries(tenant_id, _key(page.after, 3), page.limit + 1)
        entries = [LedgerEntry(**row) for row in found]
        return page_of(
            entries, page.limit, lambda entry: [entry.period, entry.line_id, entry.account]
        )


def _usage_routes(api: APIRouter, usage: UsageStore, config: BillingConfig) -> None:
    @api.get("/usage", tags=["usage"])
    async def list_usage(
        page: _Paged,
        tenant_id: _Name = None,
        meter: _Name = None,
        since: Annotated[datetime | None, Query(alias="from")] = None,
        until: Annotated[datetime | None, Query(alias="to")] = None,
    ) -> Page[UsageHour]:
        """Usage by hour of event time, oldest first; `from` is included, `to` is not."""
        after = _key(page.after, 3, numbered=True)
        wanted = HourlyUsage(tenant_id, meter, _micros(since), _micros(until), after)
        found = await usage.hourly(wanted, page.limit + 1)
        shown = page_of(
            found, page.limit, lambda row: [row["hour_us"], row["tenant_id"], row["meter"]]
        )
        return Page(items=[_hour(row) for row in shown.items], next_cursor=shown.next_cursor)

    @api.get("/plans", tags=["usage"])
    async def get_plans() -> Plans:
        """What is metered and what it costs; prices in major units of the currency."""
        return Plans(
            currency=config.currency,
            grace_hours=config.grace_us / 3600e6,
            meters={name: asdict(meter) for name, meter in config.meters.items()},
            plans={
                name: {"base_fee": str(plan.base_fee), "prices": _prices(plan.prices)}
                for name, plan in config.plans.items()
            },
            tenants={"default": config.default_plan, **config.tenants},
        )


def _proof_routes(api: APIRouter, books: Books, proofs: Proofs) -> None:
    async def known(line_id: str) -> tuple[Head, InvoiceLine]:
        found = await books.line(_text(line_id))
        if found is None:
            raise Problem(404, "not_found", f"there is no invoice line {line_id}")
        return found

    @api.get("/lines/{line_id:path}/verify", tags=["proofs"], responses=failures(404, 410))
    async def verify_line(line_id: str) -> Proof:
        """Read a line's records from the log, count and rate them again, and compare."""
        return await proofs.line(*await known(line_id))

    @api.get("/lines/{line_id:path}", tags=["proofs"], responses=failures(404))
    async def get_line(line_id: str) -> LineInFull:
        """One line, and where in the log it comes from."""
        head, line = await known(line_id)
        meter = await proofs.meter_of(head, line)
        return LineInFull(
            **_line(line).model_dump(),
            invoice_id=head.invoice_id,
            stripe_id=head.stripe_id,
            tenant_id=head.tenant_id,
            currency=head.currency,
            topic=meter.topic if meter else None,
            filter=meter.filter if meter else None,
        )

    @api.post("/recount", tags=["proofs"], responses=failures(404, 410))
    async def recount(period: Annotated[str, Query(pattern=_PERIOD)]) -> Recount:
        """Make all invoices of a month once more from the log, and compare."""
        made = await proofs.month(period)
        if made is None:
            raise Problem(404, "not_found", f"{period} is not closed")
        return made


def _key(after: Any, length: int, *, numbered: bool = False) -> Any:
    """The key in a cursor: texts, the first of them a number if `numbered`."""
    if after is None:
        return None
    kinds = [int if numbered else str, *[str] * (length - 1)]
    if not isinstance(after, list) or [type(part) for part in after] != kinds:
        raise Problem(422, "invalid_cursor", "use next_cursor of the page before")
    return tuple(after)


def _text(given: str) -> str:
    if "\x00" in given:
        raise Problem(422, "invalid", "an id has no zero character")
    return given


def _micros(at: datetime | None) -> int | None:
    if at is None:
        return None
    known = at if at.tzinfo is not None else at.replace(tzinfo=UTC)
    return (known - _EPOCH) // timedelta(microseconds=1)


def _hour(row: Mapping[str, Any]) -> UsageHour:
    at = _EPOCH + timedelta(microseconds=row["hour_us"])
    return UsageHour(**row, hour=at, quantity=row["quantity_micro"] / MICRO)


def _line(line: InvoiceLine) -> LineAnswer:
    return LineAnswer(
        **{**asdict(line), "unit_price": str(line.unit_price)},
        quantity=line.quantity_micro / MICRO,
    )


def _prices(prices: Mapping[str, Any]) -> dict[str, Any]:
    return {
        meter: {
            "included": price.included,
            "tiers": [{"up_to": tier.up_to, "unit": str(tier.unit_price)} for tier in price.tiers],
        }
        for meter, price in prices.items()
    }
