"""Rating: graduated tiers, exact arithmetic, one rounding a line."""

from __future__ import annotations

from decimal import ROUND_HALF_EVEN, Decimal
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.billing.domain.plans import BASE_FEE, BillingConfig, Plan, Price, Tier
from services.billing.domain.rating import RatedLine, amount, rate, rate_difference, tier_quantities

MICRO = 10**6
LARGEST = 2**63 - 1


def config_of(plan: Plan, currency: str = "usd") -> BillingConfig:
    return BillingConfig(currency, 0, {}, {plan.name: plan}, {}, plan.name)


@st.composite
def prices(draw: st.DrawFn, most: int = 10**6) -> Price:
    steps = sorted(draw(st.sets(st.integers(1, most), max_size=4)))
    units = st.decimals(0, 1000, places=draw(st.integers(0, 6)), allow_nan=False)
    tiers = tuple(Tier(up_to, draw(units)) for up_to in [*steps, None])
    return Price(draw(st.integers(0, most)), tiers)


quantities = st.one_of(st.integers(0, 3 * 10**12), st.integers(0, LARGEST))


def test_an_invoice_by_hand() -> None:
    price = Price(
        1000,
        (
            Tier(10_000, Decimal("0.012")),
            Tier(100_000, Decimal("0.008")),
            Tier(None, Decimal("0.005")),
        ),
    )
    plan = Plan("standard", Decimal("49.00"), {"predictions": price})
    assert rate(config_of(plan), plan, {"predictions": 111_003 * MICRO, "unpriced": 5}) == [
        RatedLine(BASE_FEE, 0, MICRO, Decimal("49.00"), 4900),
        RatedLine("predictions", 1, 10_000 * MICRO, Decimal("0.012"), 12_000),
        RatedLine("predictions", 2, 90_000 * MICRO, Decimal("0.008"), 72_000),
        RatedLine("predictions", 3, 10_003 * MICRO, Decimal("0.005"), 5002),
    ]
    assert rate(config_of(plan), plan, {"predictions": 1000 * MICRO}) == rate(
        config_of(plan), plan, {}
    )


@pytest.mark.parametrize(
    ("currency", "unit", "minor"),
    [("usd", "0.005", 0), ("usd", "0.015", 2), ("usd", "0.025", 2), ("jpy", "0.5", 0)],
)
def test_halves_go_to_the_even_minor_unit(currency: str, unit: str, minor: int) -> None:
    plan = Plan("p", Decimal(0), {"m": Price(0, (Tier(None, Decimal(unit)),))})
    (line,) = rate(config_of(plan, currency), plan, {"m": MICRO})
    assert line.amount_minor == minor


@settings(max_examples=200, deadline=None)
@given(prices(), quantities)
def test_tiers_split_the_billable_quantity_exactly(price: Price, quantity: int) -> None:
    shares = tier_quantities(price, quantity)
    assert sum(shares) == max(0, quantity - price.included * MICRO)
    assert all(share >= 0 for share in shares)
    # A tier only fills when all before it are full.
    floor = 0
    for tier, share, after in zip(price.tiers, shares, [*shares[1:], 0], strict=True):
        width = None if tier.up_to is None else (tier.up_to - floor) * MICRO
        assert width is None or share <= width
        assert not after or share == width
        floor = tier.up_to or floor


@settings(max_examples=200, deadline=None)
@given(prices(), quantities, quantities, st.sampled_from(["usd", "jpy"]))
def test_more_usage_never_costs_less(price: Price, a: int, b: int, currency: str) -> None:
    plan = Plan("p", Decimal(0), {"m": price})
    config = config_of(plan, currency)
    low, high = (
        sum(line.amount_minor for line in rate(config, plan, {"m": quantity}))
        for quantity in sorted((a, b))
    )
    assert low <= high


@settings(max_examples=150, deadline=None)
@given(prices(most=30), st.integers(0, 150), st.integers(0, MICRO - 1))
def test_an_amount_is_the_sum_over_its_units(price: Price, units: int, part: int) -> None:
    """Unit by unit in fractions, the last one a part; rounded once."""
    naive = dict.fromkeys(range(1, len(price.tiers) + 1), Fraction(0))
    sizes = [Fraction(1)] * units + [Fraction(part, MICRO)]
    for number, size in enumerate(sizes, 1):
        billable = number - price.included
        if billable <= 0:
            continue
        tier = next(
            n for n, t in enumerate(price.tiers, 1) if t.up_to is None or billable <= t.up_to
        )
        naive[tier] += size * Fraction(price.tiers[tier - 1].unit_price) * 100
    plan = Plan("p", Decimal(0), {"m": price})
    lines = rate(config_of(plan), plan, {"m": units * MICRO + part})
    rated = {line.tier: line.amount_minor for line in lines}
    assert {tier: rated.get(tier, 0) for tier in naive} == {t: round(x) for t, x in naive.items()}


@settings(max_examples=150, deadline=None)
@given(st.integers(0, LARGEST), st.decimals(0, 10**12 - 1, places=12, allow_nan=False))
def test_no_quantity_or_price_is_too_long_to_be_exact(quantity: int, unit: Decimal) -> None:
    plan = Plan("p", Decimal(0), {})
    exact = Fraction(quantity, MICRO) * Fraction(unit) * 100
    assert amount(config_of(plan), quantity, unit) == round(exact)


def test_control_the_default_decimal_context_is_too_short() -> None:
    quantity, unit = 7628363926752234389, Decimal("227172391571.652630377832")
    naive = (Decimal(quantity) * unit).scaleb(-4).to_integral_value(ROUND_HALF_EVEN)
    plan = Plan("p", Decimal(0), {})
    assert amount(config_of(plan), quantity, unit) != int(naive)


def test_control_rounding_each_unit_gives_another_amount() -> None:
    plan = Plan("p", Decimal(0), {"m": Price(0, (Tier(None, Decimal("0.004")),))})
    (line,) = rate(config_of(plan), plan, {"m": 1000 * MICRO})
    assert line.amount_minor == 400 != 1000 * amount(config_of(plan), MICRO, Decimal("0.004"))


@settings(max_examples=150, deadline=None)
@given(prices(), quantities, quantities, quantities)
def test_differences_add_up(price: Price, a: int, b: int, c: int) -> None:
    plan = Plan("p", Decimal(0), {"m": price})
    config = config_of(plan)

    def total(usage: int, billed: int) -> int:
        lines = rate_difference(config, plan, {"m": usage}, {"m": billed})
        return sum(line.amount_minor for line in lines)

    assert total(a, 0) + total(b, a) + total(c, b) == total(c, 0)


def test_negative_usage_is_a_mistake_of_the_caller() -> None:
    plan = Plan("p", Decimal(0), {"m": Price(0, (Tier(None, Decimal(1)),))})
    with pytest.raises(ValueError, match="cannot be negative, found -1"):
        rate(config_of(plan), plan, {"m": -1})
