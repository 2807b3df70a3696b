"""What billing tells Prometheus about its books: true at each count, and bounded in labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import yaml
from prometheus_client import CollectorRegistry
from sqlalchemy.ext.asyncio import AsyncEngine

from causemesh.clock import SystemClock
from services.billing.books import Books, Terms
from services.billing.domain.invoicing import close_month
from services.billing.domain.usage import UsageRow
from services.billing.reporting import BillingMetrics, Reporter
from services.billing.store import metadata
from services.billing.tables import usage_buckets

pytestmark = pytest.mark.servers
PROJECT = Path(__file__).parents[2] / "project"
TERMS = Terms.read(yaml.safe_load((PROJECT / "billing.yaml").read_text()))
JANUARY, FEBRUARY = "2013-01", "2013-02"
Series = dict[tuple[str, ...], float]


class Told:
    """A reporter and what it told last."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._registry = CollectorRegistry()
        metrics = BillingMetrics(self._registry)
        self._reporter = Reporter(engine, metrics, clock=SystemClock(), every_s=1)

    async def again(self) -> dict[str, Series]:
        """Series by metric, less its prefix: label values in order of the labels' names."""
        await self._reporter.report()
        found: dict[str, Series] = {}
        for family in self._registry.collect():
            for sample in family.samples:
                labels = tuple(value for _, value in sorted(sample.labels.items()))
                name = sample.name.removeprefix("causemesh_billing_")
                found.setdefault(name, {})[labels] = sample.value
        return found


@pytest.fixture
async def tables(database: AsyncEngine) -> AsyncEngine:
    async with database.begin() as connection:
        await connection.run_sync(metadata.create_all)
    return database


async def close(engine: AsyncEngine, period: str, tenants: Sequence[str]) -> int:
    """Close a month with an invoice for each tenant; returns their total."""
    used = (UsageRow("predictions", period, 30 * 10**6, ()),)
    made = [(close_month(TERMS.config, name, period, used), used) for name in tenants]
    async with engine.begin() as transaction:
        await Books.open_month(transaction, period, TERMS)
        await Books.add(transaction, made)
    return sum(invoice.total_minor for invoice, _ in made)


async def change(engine: AsyncEngine, statement: str) -> None:
    async with engine.begin() as transaction:
        await transaction.execute(sa.text(statement))


async def use(
    engine: AsyncEngine, meter: str, month: str, due: str, count: int, *, tenant: str = "A"
) -> None:
    """So many hourly buckets."""
    rows: list[dict[str, Any]] = [
        {
            "tenant_id": tenant,
            "meter": meter,
            "aggregation": "count",
            "topic": "t",
            "partition": 0,
            "hour_us": int(month.replace("-", "")) * 1000 + hour,
            "due_period": due,
            "usage_period": month,
            "quantity_micro": 10**6,
            **dict.fromkeys(("first", "last", "at_us", "at_position"), 0),
        }
        for hour in range(count)
    ]
    async with engine.begin() as transaction:
        await transaction.execute(sa.insert(usage_buckets), rows)


async def test_invoices_and_their_money_by_state(tables: AsyncEngine) -> None:
    told = Told(tables)
    assert (await told.again())["invoices"] == {("closed",): 0, ("finalised",): 0, ("mismatch",): 0}
    total = await close(tables, JANUARY, ["A", "B", "C"])
    assert total > 0
    found = await told.again()
    assert found["invoices"] == {("closed",): 3, ("finalised",): 0, ("mismatch",): 0}
    assert found["invoiced_minor"] == {("usd", "closed"): total}
    await change(tables, "UPDATE invoices SET status = 'finalised'")
    await change(tables, "UPDATE invoices SET status = 'mismatch' WHERE tenant_id = 'B'")
    found = await told.again()
    assert found["invoices"] == {("closed",): 0, ("finalised",): 2, ("mismatch",): 1}
    # No series of a state that no invoice is in any more.
    assert found["invoiced_minor"] == {
        ("usd", "finalised"): total * 2 / 3,
        ("usd", "mismatch"): total / 3,
    }


async def test_usage_is_unbilled_until_its_month_closes(tables: AsyncEngine) -> None:
    told = Told(tables)
    await use(tables, "predictions", JANUARY, JANUARY, 5)
    assert (await told.again())["unbilled_buckets"] == {("in_time", "predictions"): 5}
    await close(tables, JANUARY, ["A"])
    assert "unbilled_buckets" not in await told.again()
    await use(tables, "predictions", JANUARY, FEBRUARY, 2)
    await use(tables, "predictions", FEBRUARY, FEBRUARY, 3)
    await use(tables, "sensors", FEBRUARY, FEBRUARY, 4)
    assert (await told.again())["unbilled_buckets"] == {
        ("late", "predictions"): 2,
        ("in_time", "predictions"): 3,
        ("in_time", "sensors"): 4,
    }
    await close(tables, FEBRUARY, ["A"])
    assert "unbilled_buckets" not in await told.again()


async def test_tenants_and_months_make_no_series(tables: AsyncEngine) -> None:
    told = Told(tables)
    await use(tables, "predictions", FEBRUARY, FEBRUARY, 1)
    await close(tables, JANUARY, ["A"])
    one = {name: set(series) for name, series in (await told.again()).items()}
    for number in range(30):
        await use(tables, "predictions", FEBRUARY, FEBRUARY, 1, tenant=f"more{number}")
    await close(tables, "2012-12", [f"more{number}" for number in range(30)])
    many = await told.again()
    assert {name: set(series) for name, series in many.items()} == one
    assert many["invoices"][("closed",)] == many["unbilled_buckets"][("in_time", "predictions")]
    assert many["invoices"][("closed",)] == 31
