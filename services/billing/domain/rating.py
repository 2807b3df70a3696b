"""Rating: from a month's quantities to amounts of money.

Tiers are graduated. The allowance comes off first; the first unit after it is the first unit of the
first tier, whose `up_to` therefore counts billable units. Each tier with a quantity is one line:

    amount_minor = round_half_even(quantity_micro / 10**6 * unit_price * 10**exponent)

computed exactly and rounded once, at the line.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import ROUND_HALF_EVEN, Context, Decimal, Inexact

from services.billing.domain.plans import BASE_FEE, BillingConfig, Plan, Price
from services.billing.domain.rows import MICRO

# An int64 quantity (19 digits) times a price (24 digits) fits, so a product is never rounded here.
_EXACT = Context(prec=64, traps=[Inexact])
_ROUND = Context(prec=64, rounding=ROUND_HALF_EVEN)


@dataclass(frozen=True)
class RatedLine:
    """One meter and tier (numbered from 1), or the base fee (meter BASE_FEE, tier 0, one unit).

    `quantity_micro` is millionths of the meter's unit, `unit_price` major units of the currency,
    `amount_minor` minor units.
    """

    meter: str
    tier: int
    quantity_micro: int
    unit_price: Decimal
    amount_minor: int


def rate(config: BillingConfig, plan: Plan, usage: Mapping[str, int]) -> list[RatedLine]:
    """The lines of one month: the base fee, then each priced meter of `usage` in the plan's order.

    `usage` maps a meter to its `quantity_micro`, 0 or more. A meter without a price costs nothing
    and has no line; neither has a base fee of zero or a tier that nothing falls in.
    """
    return [*base_fee(config, plan), *rate_difference(config, plan, usage, {})]


def base_fee(config: BillingConfig, plan: Plan) -> Iterator[RatedLine]:
    """The line of the plan's monthly fee, if it has one."""
    if plan.base_fee:
        yield RatedLine(BASE_FEE, 0, MICRO, plan.base_fee, amount(config, MICRO, plan.base_fee))


def rate_difference(
    config: BillingConfig, plan: Plan, usage: Mapping[str, int], billed: Mapping[str, int]
) -> Iterator[RatedLine]:
    """What rating `usage` gives beyond rating `billed`, tier by tier, without the base fee.

    Both map a meter to its `quantity_micro`. Lines are negative where `usage` is the smaller one.
    """
    for meter, price in plan.prices.items():
        now = tier_quantities(price, usage.get(meter, 0))
        before = tier_quantities(price, billed.get(meter, 0))
        steps = zip(price.tiers, now, before, strict=True)
        for number, (tier, new, old) in enumerate(steps, 1):
            if new != old:
                due = amount(config, new, tier.unit_price) - amount(config, old, tier.unit_price)
                yield RatedLine(meter, number, new - old, tier.unit_price, due)


def tier_quantities(price: Price, quantity_micro: int) -> list[int]:
    """What falls in each tier, in millionths; together all that exceeds the allowance."""
    if quantity_micro < 0:
        raise ValueError(f"usage cannot be negative, found {quantity_micro} millionths")
    left = max(0, quantity_micro - price.included * MICRO)
    shares = []
    floor = 0
    for tier in price.tiers:
        share = left if tier.up_to is None else min(left, (tier.up_to - floor) * MICRO)
        shares.append(share)
        left -= share
        floor = tier.up_to or floor
    return shares


def amount(config: BillingConfig, quantity_micro: int, unit_price: Decimal) -> int:
    """Minor units for a quantity at a price in major units, rounded half to even."""
    exact = _EXACT.multiply(Decimal(quantity_micro), unit_price)
    scaled = exact.scaleb(config.exponent - 6, _EXACT)
    return int(scaled.quantize(Decimal(1), context=_ROUND))
