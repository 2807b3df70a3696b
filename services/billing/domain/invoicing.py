"""Closing a month: what a tenant owes, as an invoice that never changes, and its ledger entries.

Usage of an earlier month that arrived after that month was closed is on this invoice, on lines of
its own: tier by tier the difference between rating all that is known of the month now and rating
what earlier invoices have billed. Both sides use the plan of today, so a new price holds for the
late part only, and as long as prices stay the invoices add up to rating everything at once.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal

from causemesh.errors import Fatal
from services.billing.domain.plans import BASE_FEE, BillingConfig
from services.billing.domain.rating import RatedLine, base_fee, rate_difference
from services.billing.domain.rows import MICRO
from services.billing.domain.usage import PositionRange, UsageRow

_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_DNS, "invoices.billing.causemesh")


@dataclass(frozen=True)
class Billed:
    """What one invoice added to the billed quantity of a meter and month, allowance included.

    Invoice lines do not tell: the allowance and meters without a price are on none of them. The
    base fee is one unit of the meter BASE_FEE. `quantity_micro` is millionths.
    """

    meter: str
    usage_period: str
    quantity_micro: int


@dataclass(frozen=True)
class InvoiceLine:
    """One meter, month of usage and tier; the base fee is tier 0.

    `quantity_micro` (millionths) and `amount_minor` are negative where a `latest` went down after
    its month was billed. `ranges` hold all of the meter's usage of `usage_period`; the quantity is
    this tier's share of it, less what earlier invoices billed.
    """

    line_id: str
    meter: str
    usage_period: str
    tier: int
    quantity_micro: int
    unit_price: Decimal
    amount_minor: int
    ranges: tuple[PositionRange, ...]


@dataclass(frozen=True)
class Invoice:
    """A closed month of one tenant. `billed` must be kept and given to every later close."""

    invoice_id: str
    tenant_id: str
    period: str
    currency: str
    lines: tuple[InvoiceLine, ...]
    billed: tuple[Billed, ...]

    @property
    def total_minor(self) -> int:
        """The sum of the lines, minor units."""
        return sum(line.amount_minor for line in self.lines)


def invoice_id(tenant: str, period: str) -> str:
    """The invoice of a tenant and month: always the same UUIDv5."""
    return str(uuid.uuid5(_NAMESPACE, f"{period}/{tenant}"))


def close_month(
    config: BillingConfig,
    tenant: str,
    period: str,
    usage_rows: Sequence[UsageRow],
    invoiced: Sequence[Billed] = (),
) -> Invoice:
    """The invoice of `period`.

    `usage_rows` are the tenant's usage of this month and of the earlier months in which something
    arrived since: for each meter and month all of it, not only the late part. `invoiced` is the
    `billed` of all the tenant's earlier invoices. The base fee is due once for each month with
    usage, and for `period` in any case when the tenant is named in the configuration. Raises Fatal
    when the month is closed already, or when usage is of a later month or given twice.
    """
    usage = _usage_by_month(tenant, period, usage_rows)
    billed = _billed_by_month(tenant, period, invoiced)
    named = config.is_named(tenant)
    if named:
        usage.setdefault(period, {})
    lines: list[InvoiceLine] = []
    added: list[Billed] = []
    for month in sorted(usage, key=lambda month: (month != period, month)):
        rows, before = usage[month], billed.get(month, {})
        now = {meter: row.quantity_micro for meter, row in rows.items()}
        fee_due = BASE_FEE not in before and ((named and month == period) or any(now.values()))
        rated = _owed(config, tenant, now, before, fee_due=fee_due)
        lines += [_line(tenant, period, month, line, rows) for line in rated]
        due = {**now, BASE_FEE: MICRO} if fee_due else now
        more = {meter: quantity - before.get(meter, 0) for meter, quantity in due.items()}
        added += [Billed(meter, month, quantity) for meter, quantity in more.items() if quantity]
    return Invoice(
        invoice_id(tenant, period), tenant, period, config.currency, tuple(lines), tuple(added)
    )


def _owed(
    config: BillingConfig,
    tenant: str,
    now: Mapping[str, int],
    before: Mapping[str, int],
    *,
    fee_due: bool,
) -> list[RatedLine]:
    plan = config.plan_of(tenant)
    fee = base_fee(config, plan) if fee_due else ()
    # A meter that is absent now has nothing new, it has not gone to zero.
    return [*fee, *rate_difference(config, plan, {**before, **now}, before)]


def _line(
    tenant: str, period: str, month: str, rated: RatedLine, rows: Mapping[str, UsageRow]
) -> InvoiceLine:
    return InvoiceLine(
        f"{tenant}/{period}/{rated.meter}/{month}/tier{rated.tier}",
        rated.meter,
        month,
        rated.tier,
        rated.quantity_micro,
        rated.unit_price,
        rated.amount_minor,
        rows[rated.meter].ranges if rated.meter in rows else (),
    )


def _usage_by_month(
    tenant: str, period: str, usage_rows: Iterable[UsageRow]
) -> dict[str, dict[str, UsageRow]]:
    months: dict[str, dict[str, UsageRow]] = {}
    for row in usage_rows:
        if row.usage_period > period:
            raise Fatal(f"usage of {row.usage_period} cannot be on {tenant}'s invoice of {period}")
        if row.meter in months.setdefault(row.usage_period, {}):
            raise Fatal(
                f"{tenant}'s {row.meter} of {row.usage_period} is given twice; add the rows up"
            )
        months[row.usage_period][row.meter] = row
    return months


def _billed_by_month(
    tenant: str, period: str, invoiced: Iterable[Billed]
) -> dict[str, dict[str, int]]:
    months: dict[str, dict[str, int]] = {}
    for part in invoiced:
        if part.usage_period >= period:
            raise Fatal(
                f"{tenant}'s month {part.usage_period} is billed already, so {period} cannot be "
                "closed (again); usage that came since goes on the next month's invoice"
            )
        month = months.setdefault(part.usage_period, {})
        month[part.meter] = month.get(part.meter, 0) + part.quantity_micro
    return months


@dataclass(frozen=True)
class Entry:
    """One side of a double entry: debits are positive `amount_minor`, credits negative."""

    line_id: str
    account: str
    currency: str
    amount_minor: int


def ledger_entries(invoice: Invoice) -> list[Entry]:
    """Each line of money as a debit of `receivable:<tenant>` and a credit of `revenue:<meter>`.

    The two sum to zero, line by line and so in all; a negative line swaps the sides.
    """
    return [
        Entry(line.line_id, account, invoice.currency, sign * line.amount_minor)
        for line in invoice.lines
        if line.amount_minor
        for account, sign in (
            (f"receivable:{invoice.tenant_id}", 1),
            (f"revenue:{line.meter}", -1),
        )
    ]
