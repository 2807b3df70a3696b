"""Closing months: what is on an invoice, late usage, the ledger and the planned Stripe calls."""

from __future__ import annotations

import uuid
from collections import Counter
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from causemesh.errors import Fatal
from services.billing.domain.invoicing import (
    Billed,
    Invoice,
    InvoiceLine,
    close_month,
    invoice_id,
    ledger_entries,
)
from services.billing.domain.periods import closable_months, month_bounds, month_of
from services.billing.domain.plans import BASE_FEE, BillingConfig, Plan, Price, Tier
from services.billing.domain.rating import rate
from services.billing.domain.stripe_calls import StripeCall, plan_calls
from services.billing.domain.usage import PositionRange, UsageRow

MICRO = 10**6
JANUARY, FEBRUARY, MARCH = MONTHS = ("2013-01", "2013-02", "2013-03")
CALLS = Price(10, (Tier(100, Decimal("0.105")), Tier(None, Decimal("0.0033"))))
PLAN = Plan(
    "standard", Decimal("49.00"), {"calls": CALLS, "gb": Price(0, (Tier(None, Decimal(2)),))}
)
CONFIG = BillingConfig("usd", 0, {}, {"standard": PLAN}, {"UA": "standard"}, "standard")
RANGES = (PositionRange("events.used", 0, 3, 17), PositionRange("events.used", 1, 0, 4))


def used(meter: str, month: str, units: float) -> UsageRow:
    return UsageRow(meter, month, round(units * MICRO), RANGES)


def summary(invoice: Invoice) -> list[tuple[str, str, int, int, int]]:
    return [
        (line.meter, line.usage_period, line.tier, line.quantity_micro, line.amount_minor)
        for line in invoice.lines
    ]


def test_a_month_has_the_fee_and_a_line_a_tier() -> None:
    invoice = close_month(CONFIG, "UA", JANUARY, [used("calls", JANUARY, 160)])
    assert summary(invoice) == [
        (BASE_FEE, JANUARY, 0, MICRO, 4900),
        ("calls", JANUARY, 1, 100 * MICRO, 1050),
        ("calls", JANUARY, 2, 50 * MICRO, 16),
    ]
    assert invoice.total_minor == 5966
    assert [line.line_id for line in invoice.lines] == [
        "UA/2013-01/base_fee/2013-01/tier0",
        "UA/2013-01/calls/2013-01/tier1",
        "UA/2013-01/calls/2013-01/tier2",
    ]
    assert [line.ranges for line in invoice.lines] == [(), RANGES, RANGES]


def test_ids_are_a_function_of_tenant_and_period() -> None:
    first, again = (close_month(CONFIG, "UA", JANUARY, []) for _ in range(2))
    assert first == again
    assert uuid.UUID(first.invoice_id).version == 5
    ids = {invoice_id(tenant, month) for tenant in ("UA", "AA", "2013-01/UA") for month in MONTHS}
    assert len(ids) == 9
    assert invoice_id("UA", JANUARY) == "7f92dca6-4418-58f9-bf92-bd853cc3cc5a"


def test_without_usage_only_a_named_tenant_pays_the_fee() -> None:
    assert summary(close_month(CONFIG, "UA", JANUARY, [])) == [(BASE_FEE, JANUARY, 0, MICRO, 4900)]
    for rows in ([], [used("calls", JANUARY, 0)]):
        nothing = close_month(CONFIG, "AA", JANUARY, rows)
        assert (nothing.lines, nothing.billed, nothing.total_minor) == ((), (), 0)
    assert close_month(CONFIG, "AA", JANUARY, [used("calls", JANUARY, 1)]).total_minor == 4900


def test_late_usage_is_on_the_next_invoice_at_the_price_of_the_difference() -> None:
    january = close_month(CONFIG, "UA", JANUARY, [used("calls", JANUARY, 100)])
    rows = [used("calls", JANUARY, 150), used("calls", FEBRUARY, 12)]
    february = close_month(CONFIG, "UA", FEBRUARY, rows, january.billed)
    assert summary(february) == [
        (BASE_FEE, FEBRUARY, 0, MICRO, 4900),
        ("calls", FEBRUARY, 1, 2 * MICRO, 21),
        ("calls", JANUARY, 1, 10 * MICRO, 105),
        ("calls", JANUARY, 2, 40 * MICRO, 13),
    ]
    assert february.lines[2].line_id == "UA/2013-02/calls/2013-01/tier1"
    alone = rate(CONFIG, PLAN, {"calls": 50 * MICRO})[1:]
    naive = sum(line.amount_minor for line in alone)
    assert naive != 105 + 13, "the control: rating the late part alone starts at the allowance"


def test_a_billed_meter_that_is_not_given_has_nothing_new() -> None:
    rows = [used("calls", JANUARY, 100), used("gb", JANUARY, 5)]
    january = close_month(CONFIG, "UA", JANUARY, rows)
    february = close_month(CONFIG, "UA", FEBRUARY, [used("gb", JANUARY, 6)], january.billed)
    assert summary(february)[1:] == [("gb", JANUARY, 1, MICRO, 200)]
    assert february.billed[1:] == (Billed("gb", JANUARY, MICRO),)


def test_usage_within_the_allowance_is_remembered_as_billed() -> None:
    january = close_month(CONFIG, "UA", JANUARY, [used("calls", JANUARY, 8)])
    assert Billed("calls", JANUARY, 8 * MICRO) in january.billed
    rows = [used("calls", JANUARY, 13)]
    february = close_month(CONFIG, "UA", FEBRUARY, rows, january.billed)
    assert summary(february)[1:] == [("calls", JANUARY, 1, 3 * MICRO, 32)]
    # The control: what the lines alone say of January is nothing, and the fee would be due again.
    forgotten = close_month(CONFIG, "UA", FEBRUARY, rows, ())
    assert (BASE_FEE, JANUARY, 0, MICRO, 4900) in summary(forgotten)


def test_a_month_whose_only_usage_came_late_still_has_its_fee_once() -> None:
    january = close_month(CONFIG, "AA", JANUARY, [])
    rows = [used("calls", JANUARY, 5)]
    february = close_month(CONFIG, "AA", FEBRUARY, rows, january.billed)
    assert summary(february) == [(BASE_FEE, JANUARY, 0, MICRO, 4900)]
    rows = [used("calls", JANUARY, 6)]
    march = close_month(CONFIG, "AA", MARCH, rows, [*january.billed, *february.billed])
    assert summary(march) == []


def test_a_new_price_holds_for_the_late_part_only() -> None:
    january = close_month(CONFIG, "UA", JANUARY, [used("gb", JANUARY, 100)])
    dearer = Plan("standard", Decimal("99.00"), {"gb": Price(0, (Tier(None, Decimal(3)),))})
    changed = BillingConfig("usd", 0, {}, {"standard": dearer}, {"UA": "standard"}, "standard")
    rows = [used("gb", JANUARY, 101)]
    february = close_month(changed, "UA", FEBRUARY, rows, january.billed)
    assert summary(february)[1:] == [("gb", JANUARY, 0 + 1, MICRO, 300)]


def test_a_gauge_that_went_down_late_is_credited() -> None:
    january = close_month(CONFIG, "UA", JANUARY, [used("gb", JANUARY, 5)])
    february = close_month(CONFIG, "UA", FEBRUARY, [used("gb", JANUARY, 3)], january.billed)
    assert summary(february)[1:] == [("gb", JANUARY, 1, -2 * MICRO, -400)]
    assert february.billed[-1] == Billed("gb", JANUARY, -2 * MICRO)
    gone = close_month(CONFIG, "UA", FEBRUARY, [used("gb", JANUARY, 0)], january.billed)
    assert summary(gone)[1:] == [("gb", JANUARY, 1, -5 * MICRO, -1000)], "the fee is not given back"


def test_what_cannot_be_closed_is_refused() -> None:
    january = close_month(CONFIG, "UA", JANUARY, [])
    with pytest.raises(Fatal, match="month 2013-01 is billed already"):
        close_month(CONFIG, "UA", JANUARY, [], january.billed)
    with pytest.raises(Fatal, match="usage of 2013-02 cannot be on UA's invoice of 2013-01"):
        close_month(CONFIG, "UA", JANUARY, [used("calls", FEBRUARY, 1)])
    with pytest.raises(Fatal, match="calls of 2013-01 is given twice"):
        close_month(CONFIG, "UA", JANUARY, [used("calls", JANUARY, 1)] * 2)


# Each arrival: meter, the month it belongs to, the close after which it came, a quantity.
arrivals = st.lists(
    st.tuples(
        st.sampled_from(["calls", "gb", "unpriced"]),
        st.integers(0, 2),
        st.integers(0, 2),
        st.integers(0, 200 * MICRO),
    ),
    max_size=12,
)


def close_all(
    tenant: str, found: list[tuple[str, int, int, int]], *, remember: bool = True
) -> list[Invoice]:
    """Close three months; each sees what belongs to it or before, and has arrived by then."""
    invoices: list[Invoice] = []
    for close, period in enumerate(MONTHS):
        known: Counter[tuple[str, str]] = Counter()
        for meter, month, delay, quantity in found:
            if month <= close and min(month + delay, 2) <= close:
                known[meter, MONTHS[month]] += quantity
        rows = [UsageRow(m, month, q, RANGES) for (m, month), q in sorted(known.items())]
        billed = [part for invoice in invoices for part in invoice.billed] if remember else []
        invoices.append(close_month(CONFIG, tenant, period, rows, billed))
    return invoices


def total(invoices: list[Invoice]) -> int:
    return sum(invoice.total_minor for invoice in invoices)


@settings(max_examples=150, deadline=None)
@given(arrivals, st.sampled_from(["UA", "AA"]))
def test_the_sum_of_all_invoices_does_not_depend_on_when_usage_arrived(
    found: list[tuple[str, int, int, int]], tenant: str
) -> None:
    late = close_all(tenant, found)
    in_time = close_all(tenant, [(meter, month, 0, q) for meter, month, _, q in found])
    assert total(late) == total(in_time)
    lines = [line for invoice in late for line in invoice.lines]
    assert len({line.line_id for line in lines}) == len(lines)
    fees = Counter(line.usage_period for line in lines if line.meter == BASE_FEE)
    assert all(count == 1 for count in fees.values())
    if tenant == "UA":
        assert set(fees) == set(MONTHS)
    plain = 0
    for number, month in enumerate(MONTHS):
        usage: Counter[str] = Counter()
        for meter, at, _, quantity in found:
            usage[meter] += quantity * (at == number)
        if tenant == "UA" or any(usage.values()):
            plain += sum(line.amount_minor for line in rate(CONFIG, PLAN, usage))
        assert tenant == "UA" or (month in fees) == any(usage.values())
    assert total(late) == plain


def test_control_without_what_was_billed_usage_is_charged_twice() -> None:
    found = [("gb", 0, 0, 5 * MICRO), ("gb", 0, 1, MICRO)]
    assert total(close_all("UA", found, remember=False)) > total(close_all("UA", found))


amounts = st.lists(st.integers(-(10**9), 10**9), max_size=8)


@given(amounts)
def test_the_ledger_balances_line_by_line(amounts: list[int]) -> None:
    lines = tuple(
        InvoiceLine(f"line{i}", f"m{i % 3}", JANUARY, 1, MICRO, Decimal(1), amount, ())
        for i, amount in enumerate(amounts)
    )
    invoice = Invoice("id", "UA", JANUARY, "usd", lines, ())
    entries = ledger_entries(invoice)
    by_line: Counter[str] = Counter()
    by_account: Counter[str] = Counter()
    for entry in entries:
        by_line[entry.line_id] += entry.amount_minor
        by_account[entry.account] += entry.amount_minor
    assert not any(by_line.values())
    assert by_account["receivable:UA"] == invoice.total_minor
    for meter in {line.meter for line in lines}:
        owed = sum(line.amount_minor for line in lines if line.meter == meter)
        assert by_account[f"revenue:{meter}"] == -owed


def test_the_ledger_of_an_invoice() -> None:
    invoice = close_month(CONFIG, "UA", JANUARY, [used("gb", JANUARY, 1)])
    assert [(e.account, e.amount_minor) for e in ledger_entries(invoice)] == [
        ("receivable:UA", 4900),
        ("revenue:base_fee", -4900),
        ("receivable:UA", 200),
        ("revenue:gb", -200),
    ]


def calls_of(tenant: str = "UA", units: float = 20.5) -> list[StripeCall]:
    return plan_calls(close_month(CONFIG, tenant, JANUARY, [used("calls", JANUARY, units)]))


def test_an_invoice_becomes_stripe_calls() -> None:
    customer, draft, fee, item, finalize = calls_of()
    number = invoice_id("UA", JANUARY)
    assert (customer.operation, customer.produces) == ("customers.create", "customer")
    assert customer.metadata == {"causemesh_tenant": "UA"}
    assert draft.needs == ("customer",)
    assert draft.params["auto_advance"] is False
    assert draft.params["pending_invoice_items_behavior"] == "exclude"
    assert draft.metadata == {"causemesh_tenant": "UA", "causemesh_invoice": number}
    assert fee.params == {
        "amount": 4900,
        "currency": "usd",
        "description": "Base fee of 2013-01",
    }
    assert item.params["amount"] == 110
    assert item.params["description"] == "calls in 2013-01: 10.5 at 0.105 USD (tier 1)"
    assert item.metadata == {
        "causemesh_tenant": "UA",
        "causemesh_invoice": number,
        "causemesh_line": "UA/2013-01/calls/2013-01/tier1",
    }
    assert item.lookup == ("causemesh_line", "UA/2013-01/calls/2013-01/tier1")
    assert (finalize.operation, finalize.needs) == ("invoices.finalize", ("invoice",))


def test_stripe_keys_are_deterministic_distinct_and_short() -> None:
    assert calls_of() == calls_of()
    keys = [call.idempotency_key for call in calls_of("T" * 400)]
    assert len(set(keys)) == len(keys)
    assert all(len(key) <= 255 for key in keys)
    assert not {c.idempotency_key for c in calls_of("AA")} & {
        c.idempotency_key for c in calls_of("UA")
    }
    # A customer outlives its invoices: every invoice asks for it under the same key.
    later = plan_calls(close_month(CONFIG, "UA", FEBRUARY, []))
    assert later[0] == calls_of()[0]
    assert not {c.idempotency_key for c in later[1:]} & {c.idempotency_key for c in calls_of()[1:]}


def test_late_lines_and_credits_say_so_and_nothing_is_planned_for_nothing() -> None:
    january = close_month(CONFIG, "UA", JANUARY, [used("gb", JANUARY, 5)])
    rows = [used("gb", JANUARY, 3)]
    calls = plan_calls(close_month(CONFIG, "UA", FEBRUARY, rows, january.billed))
    assert calls[3].params["description"] == "gb in 2013-01, arrived late: -2 at 2 USD (tier 1)"
    assert calls[3].params["amount"] == -400
    assert plan_calls(close_month(CONFIG, "AA", JANUARY, [])) == []


HOUR = 3600 * 10**6


def test_months_are_calendar_months_in_utc() -> None:
    start, end = month_bounds(JANUARY)
    assert (month_of(start), month_of(end - 1), month_of(end)) == (JANUARY, JANUARY, FEBRUARY)
    assert month_of(start - 1) == "2012-12"
    assert month_of(-1) == "1969-12"
    assert (end - start) // HOUR == 31 * 24
    first, last = month_bounds("2012-02")
    assert (last - first) // HOUR == 29 * 24
    for text in ("2013-1", "2013-13", "13-01", "2013-01-01"):
        with pytest.raises(ValueError, match=r"."):
            month_bounds(text)


@given(st.integers(-(10**16), 10**17))
def test_every_instant_is_in_the_bounds_of_its_month(us: int) -> None:
    start, end = month_bounds(month_of(us))
    assert start <= us < end
    assert month_bounds(month_of(end))[0] == end


def test_a_month_closes_when_the_watermark_is_past_its_grace() -> None:
    end = month_bounds(FEBRUARY)[1]
    open_months = [MARCH, FEBRUARY, JANUARY]
    assert closable_months(end + 6 * HOUR, 6 * HOUR, open_months) == [JANUARY, FEBRUARY]
    assert closable_months(end + 6 * HOUR - 1, 6 * HOUR, open_months) == [JANUARY]
    assert closable_months(-(2**62), 0, open_months) == []
