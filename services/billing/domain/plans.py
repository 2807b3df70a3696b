"""Meters, plans and tenants, and how a project's `billing.yaml` becomes them.

```yaml
currency: usd                    # usd, eur, gbp, jpy
grace_hours: 6                   # how long after its end a month stays open, in event time
meters:                          # filter and value are SQL over one event of the topic
  predictions:
    topic: inference.predictions.v1
    aggregation: count           # count, sum, max, unique, latest
    filter: outcome = 'predicted'
  compute_ms: {topic: inference.predictions.v1, aggregation: sum, value: compute_ms}
plans:
  standard:
    base_fee: "49.00"            # a month
    prices:
      predictions:
        included: 1000           # whole units a month that cost nothing
        tiers:                   # of what is left, counted from 0
          - {up_to: 10000, unit: "0.012"}
          - {unit: "0.005"}
tenants:
  default: standard              # for everyone who is not named
  UA: standard                   # named: pays the base fee in a month without usage, too
```

Money is text in quotes: YAML would read a bare 0.012 as binary floating point.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from itertools import pairwise
from typing import Any, Literal, NoReturn, get_args

from causemesh.errors import Misdeclared
from causemesh.expressions import check_expression

Aggregation = Literal["count", "sum", "max", "unique", "latest"]
AGGREGATIONS: tuple[Aggregation, ...] = get_args(Aggregation)

EXPONENTS = {"usd": 2, "eur": 2, "gbp": 2, "jpy": 0}
"""Digits behind the point of each currency, ISO 4217."""

BASE_FEE = "base_fee"
"""Stands in place of a meter on the line of the monthly fee."""

DEFAULT = "default"
"""The key under `tenants` that holds for whoever is not named."""

_SECTIONS = ("meters", "plans", "tenants")
_HOUR_US = 3600 * 10**6
_NAME = re.compile(r"[a-z][a-z0-9_]{0,62}\Z")
# Twelve digits either side: a product with an int64 quantity stays exact, see rating.
_MONEY = re.compile(r"[0-9]{1,12}(\.[0-9]{1,12})?\Z")


@dataclass(frozen=True)
class Meter:
    """What is counted: an aggregation over the events of one topic.

    `filter` (an SQL condition) chooses the events, all without it. `value` is the SQL expression
    that is aggregated; None for `count`.
    """

    name: str
    topic: str
    aggregation: Aggregation
    filter: str | None = None
    value: str | None = None


@dataclass(frozen=True)
class Tier:
    """One step of a price: units up to `up_to` (None: all further ones) cost `unit_price` each.

    `up_to` is in whole units beyond the allowance, `unit_price` in the currency's major unit.
    """

    up_to: int | None
    unit_price: Decimal


@dataclass(frozen=True)
class Price:
    """A graduated price: `included` whole units a month are free, the rest walks up the tiers."""

    included: int
    tiers: tuple[Tier, ...]


@dataclass(frozen=True)
class Plan:
    """What a tenant pays: a monthly fee in major units, and a price for each billed meter."""

    name: str
    base_fee: Decimal
    prices: Mapping[str, Price]


@dataclass(frozen=True)
class BillingConfig:
    """All of a project's billing. `grace_us` is microseconds of event time."""

    currency: str
    grace_us: int
    meters: Mapping[str, Meter]
    plans: Mapping[str, Plan]
    tenants: Mapping[str, str]
    default_plan: str

    @property
    def exponent(self) -> int:
        """Digits behind the currency's point: a major unit is 10**exponent minor units."""
        return EXPONENTS[self.currency]

    def plan_of(self, tenant: str) -> Plan:
        """The tenant's plan, or the default one."""
        return self.plans[self.tenants.get(tenant, self.default_plan)]

    def is_named(self, tenant: str) -> bool:
        """Whether the tenant is a customer by name, with or without usage."""
        return tenant in self.tenants


def parse_billing(document: Mapping[str, Any]) -> BillingConfig:
    """Read a parsed `billing.yaml`; Misdeclared names the key and what to change."""
    body = _mapping("the document", document, {"currency", "grace_hours", *_SECTIONS})
    currency = body.get("currency")
    if not isinstance(currency, str) or currency not in EXPONENTS:
        _refuse("currency", f"{currency!r} is not supported; use one of {', '.join(EXPONENTS)}")
    grace_hours = _whole("grace_hours", body.get("grace_hours", 0))
    sections = {name: _section(name, body.get(name)) for name in _SECTIONS}
    meters = {name: _meter(name, meter) for name, meter in sections["meters"].items()}
    exponent = EXPONENTS[currency]
    plans = {name: _plan(name, plan, meters, exponent) for name, plan in sections["plans"].items()}
    tenants = _tenants(sections["tenants"], plans)
    default = tenants.pop(DEFAULT)
    return BillingConfig(currency, grace_hours * _HOUR_US, meters, plans, tenants, default)


def _refuse(key: str, change: str) -> NoReturn:
    raise Misdeclared(f"billing.yaml: {key}: {change}")


def _section(name: str, value: object) -> dict[str, Any]:
    section = _mapping(name, value)
    if not section:
        _refuse(name, "is missing or empty; add at least one")
    return section


def _mapping(key: str, value: object, known: set[str] | None = None) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        _refuse(key, f"expected keys and values, found {value!r}")
    for name in value:
        if not isinstance(name, str):
            _refuse(key, f"the key {name!r} is no text; put it in quotes")
        if known is not None and name not in known:
            _refuse(f"{key}.{name}", f"is no known key; known: {', '.join(sorted(known))}")
    return dict(value)


def _text(key: str, value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        _refuse(key, f"expected text, found {value!r}")
    return value


def _whole(key: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        _refuse(key, f"expected a whole number, found {value!r}")
    if value < 0:
        _refuse(key, f"must not be negative, found {value}")
    return value


def _money(key: str, value: object) -> Decimal:
    if not isinstance(value, str):
        _refuse(key, f'write the amount in quotes, such as "0.012"; found {value!r}')
    if value.startswith("-"):
        _refuse(key, f"must not be negative, found {value!r}")
    if not _MONEY.match(value):
        _refuse(key, f"expected an amount of at most 12 digits either side, found {value!r}")
    return Decimal(value)


def _meter(name: str, value: object) -> Meter:
    key = f"meters.{name}"
    body = _mapping(key, value, {"topic", "aggregation", "filter", "value"})
    if not _NAME.match(name) or name == BASE_FEE:
        _refuse(key, f"a meter's name must match {_NAME.pattern} and not be {BASE_FEE!r}")
    aggregation = body.get("aggregation")
    if aggregation not in AGGREGATIONS:
        _refuse(
            f"{key}.aggregation", f"expected one of {', '.join(AGGREGATIONS)}, not {aggregation!r}"
        )
    if (aggregation == "count") == ("value" in body):
        change = "remove it, count counts events" if "value" in body else f"{aggregation} needs one"
        _refuse(f"{key}.value", change)
    return Meter(
        name,
        _text(f"{key}.topic", body.get("topic")),
        aggregation,
        _expression(f"{key}.filter", body["filter"]) if "filter" in body else None,
        _expression(f"{key}.value", body["value"]) if "value" in body else None,
    )


def _expression(key: str, value: object) -> str:
    text = _text(key, value)
    problem = check_expression(text)
    if problem is not None:
        _refuse(key, problem)
    return text


def _plan(name: str, value: object, meters: Mapping[str, Meter], exponent: int) -> Plan:
    key = f"plans.{name}"
    body = _mapping(key, value, {"base_fee", "prices"})
    fee = _money(f"{key}.base_fee", body.get("base_fee", "0"))
    if fee != round(fee, exponent):
        _refuse(f"{key}.base_fee", f"the currency has {exponent} digits behind the point: {fee}")
    prices = _mapping(f"{key}.prices", body.get("prices"))
    for meter in prices:
        if meter not in meters:
            _refuse(f"{key}.prices.{meter}", f"is no meter; declared: {', '.join(meters)}")
    return Plan(name, fee, {m: _price(f"{key}.prices.{m}", price) for m, price in prices.items()})


def _price(key: str, value: object) -> Price:
    body = _mapping(key, value, {"included", "tiers"})
    included = _whole(f"{key}.included", body.get("included", 0))
    steps = body.get("tiers")
    if not isinstance(steps, list) or not steps:
        _refuse(f"{key}.tiers", 'expected a list such as [{unit: "0.01"}]')
    tiers = tuple(_tiers(f"{key}.tiers", steps))
    *bounded, last = (tier.up_to for tier in tiers)
    if last is not None:
        _refuse(f"{key}.tiers[{len(tiers) - 1}]", "the last tier must be open; remove its `up_to`")
    for index, (lower, upper) in enumerate(pairwise([0, *bounded])):
        if lower is None or upper is None:
            _refuse(f"{key}.tiers[{index}]", "only the last tier is open; give it an `up_to`")
        if upper <= lower:
            _refuse(f"{key}.tiers[{index}].up_to", f"must rise above {lower}, found {upper}")
    return Price(included, tiers)


def _tiers(key: str, steps: list[object]) -> Iterator[Tier]:
    for index, step in enumerate(steps):
        here = f"{key}[{index}]"
        body = _mapping(here, step, {"up_to", "unit"})
        up_to = _whole(f"{here}.up_to", body["up_to"]) if "up_to" in body else None
        yield Tier(up_to, _money(f"{here}.unit", body.get("unit")))


def _tenants(body: Mapping[str, Any], plans: Mapping[str, Plan]) -> dict[str, str]:
    for tenant, plan in body.items():
        if not isinstance(plan, str) or plan not in plans:
            _refuse(f"tenants.{tenant}", f"{plan!r} is no plan; declared: {', '.join(plans)}")
    if DEFAULT not in body:
        _refuse(f"tenants.{DEFAULT}", "name the plan of tenants that are not listed")
    return dict(body)
