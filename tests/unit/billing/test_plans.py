"""billing.yaml: what a person writes, what it means, and what is refused."""

from __future__ import annotations

import copy
from decimal import Decimal
from typing import Any

import pytest
import yaml

from causemesh.errors import Misdeclared
from services.billing.domain.plans import Meter, Price, Tier, parse_billing

DOCUMENT = """
currency: usd
grace_hours: 6
meters:
  predictions:
    {topic: inference.predictions.v1, aggregation: count, filter: "outcome = 'predicted'"}
  compute_ms:  {topic: inference.predictions.v1, aggregation: sum, value: compute_ms}
  departures:  {topic: events.flight_departed, aggregation: count}
plans:
  standard:
    base_fee: "49.00"
    prices:
      predictions:
        included: 1000
        tiers: [{up_to: 10000, unit: "0.012"}, {up_to: 100000, unit: "0.008"}, {unit: "0.005"}]
      departures:  {included: 0, tiers: [{unit: "0.001"}]}
  free: {}
tenants:
  default: standard
  UA: free
"""


def test_a_document_becomes_a_configuration() -> None:
    config = parse_billing(yaml.safe_load(DOCUMENT))
    assert (config.currency, config.exponent) == ("usd", 2)
    assert config.grace_us == 6 * 3600 * 10**6
    assert config.meters["predictions"] == Meter(
        "predictions", "inference.predictions.v1", "count", "outcome = 'predicted'"
    )
    assert config.meters["compute_ms"].value == "compute_ms"
    assert config.plan_of("AA").base_fee == Decimal("49.00")
    assert config.plan_of("AA").prices["predictions"] == Price(
        1000,
        (
            Tier(10_000, Decimal("0.012")),
            Tier(100_000, Decimal("0.008")),
            Tier(None, Decimal("0.005")),
        ),
    )
    assert config.plan_of("UA").name == "free"
    assert (config.is_named("UA"), config.is_named("AA"), config.is_named("default")) == (
        True,
        False,
        False,
    )


PRICE = "plans.standard.prices.predictions"
REFUSED: list[tuple[str, Any, str]] = [
    ("currency", "chf", "currency: 'chf' is not supported; use one of usd, eur, gbp, jpy"),
    ("currency", ["usd"], "is not supported"),
    ("colour", "red", "the document.colour: is no known key"),
    ("grace_hours", -1, "grace_hours: must not be negative"),
    ("grace_hours", "6h", "grace_hours: expected a whole number"),
    ("meters", {}, "meters: is missing or empty"),
    ("meters", ["a"], "meters: expected keys and values"),
    ("meters.Bad-Name", {}, "a meter's name must match"),
    ("meters.base_fee", {"topic": "t", "aggregation": "count"}, "not be 'base_fee'"),
    ("meters.departures.aggregation", "mean", "expected one of count, sum, max, unique, latest"),
    ("meters.departures.aggregation", "sum", "meters.departures.value: sum needs one"),
    ("meters.departures.value", "x", "remove it, count counts events"),
    ("meters.departures.topic", "", "meters.departures.topic: expected text"),
    ("meters.predictions.filter", "outcome = ", "meters.predictions.filter: 'outcome = ' is no"),
    ("meters.predictions.filter", "score > avg(score)", "uses 'avg'"),
    ("meters.predictions.filter", "1 = 1", "reads no column"),
    ("meters.predictions.fliter", "a = 1", "meters.predictions.fliter: is no known key"),
    ("plans.standard.base_fee", "49.005", "the currency has 2 digits behind the point"),
    ("plans.standard.base_fee", "-1.00", "plans.standard.base_fee: must not be negative"),
    ("plans.standard.base_fee", 49.0, "write the amount in quotes"),
    ("plans.standard.base_fee", "1e3", "expected an amount"),
    ("plans.standard.base_fee", "NaN", "expected an amount"),
    ("plans.standard.prices.landings", {}, "prices.landings: is no meter; declared: predictions"),
    (f"{PRICE}.included", -1, f"{PRICE}.included: must not be negative"),
    (f"{PRICE}.included", True, "expected a whole number"),
    (f"{PRICE}.tiers", [], f"{PRICE}.tiers: expected a list"),
    (f"{PRICE}.tiers", [{"unit": "-0.1"}], f"{PRICE}.tiers[0].unit: must not be negative"),
    (f"{PRICE}.tiers", [{"unit": 0.1}], f"{PRICE}.tiers[0].unit: write the amount in quotes"),
    (f"{PRICE}.tiers", [{}], f"{PRICE}.tiers[0].unit: write"),
    (f"{PRICE}.tiers", [{"up_to": 5, "unit": "1"}], "tiers[0]: the last tier must be open"),
    (
        f"{PRICE}.tiers",
        [{"up_to": 5, "unit": "1"}, {"up_to": 5, "unit": "1"}, {"unit": "1"}],
        f"{PRICE}.tiers[1].up_to: must rise above 5, found 5",
    ),
    (f"{PRICE}.tiers", [{"up_to": 0, "unit": "1"}, {"unit": "1"}], "must rise above 0"),
    (f"{PRICE}.tiers", [{"unit": "1"}, {"unit": "1"}], "tiers[0]: only the last tier is open"),
    ("tenants.AA", "premium", "tenants.AA: 'premium' is no plan; declared: standard, free"),
    ("tenants", {"AA": "free"}, "tenants.default: name the plan"),
    ("tenants", {"default": "free", False: "free"}, "the key False is no text; put it in quotes"),
]


@pytest.mark.parametrize(("key", "value", "says"), REFUSED)
def test_a_mistake_is_named_with_its_key(key: str, value: Any, says: str) -> None:
    document = copy.deepcopy(yaml.safe_load(DOCUMENT))
    *path, last = key.split(".")
    place = document
    for step in path:
        place = place[step]
    place[last] = value
    with pytest.raises(Misdeclared) as refusal:
        parse_billing(document)
    assert str(refusal.value).startswith("billing.yaml: ")
    assert says in str(refusal.value)


def test_a_fee_has_as_many_digits_as_its_currency() -> None:
    document = yaml.safe_load(DOCUMENT)
    document["currency"] = "jpy"
    document["plans"]["standard"]["base_fee"] = "49.5"
    with pytest.raises(Misdeclared, match="the currency has 0 digits"):
        parse_billing(document)
    document["plans"]["standard"]["base_fee"] = "49.00"
    assert parse_billing(document).plans["standard"].base_fee == 49
