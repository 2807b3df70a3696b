"""Traced usage leads to its invoice: kept until the month closes, bounded, and nothing untraced."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import sqlalchemy as sa
import yaml
from sqlalchemy.ext.asyncio import AsyncEngine

from causemesh.bus.base import RawBatch
from causemesh.runner import Batch
from services.billing.domain.plans import parse_billing
from services.billing.store import metadata
from services.billing.tracing import keep, taken_for, traced_usage

pytestmark = pytest.mark.servers
PROJECT = Path(__file__).parents[2] / "project"
METERS = list(parse_billing(yaml.safe_load((PROJECT / "billing.yaml").read_text())).meters.values())
TOPIC = "inference.predictions.v1"
JANUARY, FEBRUARY = "2013-01", "2013-02"
JANUARY_US = 1_356_998_400_000_000


def context(number: int) -> bytes:
    return f"00-{number:032x}-{number:016x}-01".encode()


def batch(tenants: Sequence[str], outcomes: Sequence[str]) -> Batch:
    """Predictions of January at positions 100, 101 and so on."""
    count = len(tenants)
    at = pl.Series([JANUARY_US] * count, dtype=pl.Int64).cast(pl.Datetime("us", "UTC"))
    frame = pl.DataFrame(
        {
            "tenant_id": tenants,
            "occurred_at": at,
            "outcome": outcomes,
            "compute_ms": [1.0] * count,
        }
    )
    raw = RawBatch(
        TOPIC, 0, np.arange(count) + 100, [None] * count, [b""] * count, np.arange(count)
    )
    return Batch(TOPIC, 0, frame, np.arange(count), raw)


def traced(unit: Batch, rows: Sequence[int], due: Sequence[str | None]) -> list[dict[str, str]]:
    contexts = {100 + row: context(row + 1) for row in rows}
    meters = [meter for meter in METERS if meter.topic == TOPIC]
    return traced_usage(unit, contexts, pl.Series(due, dtype=pl.String), meters)


@pytest.fixture
async def tables(database: AsyncEngine) -> AsyncEngine:
    async with database.begin() as connection:
        await connection.run_sync(metadata.create_all)
    return database


def test_only_what_a_meter_counts_is_traced_usage() -> None:
    """A failed prediction costs compute alone; a late one is due when its invoice is."""
    unit = batch(["A", "A", "B", "B"], ["predicted", "failed", "predicted", "predicted"])
    found = traced(unit, [0, 1, 3], [None, None, None, FEBRUARY])
    assert sorted((one["meter"], one["tenant_id"], one["due_period"]) for one in found) == [
        ("compute_ms", "A", JANUARY),
        ("compute_ms", "A", JANUARY),
        ("compute_ms", "B", FEBRUARY),
        ("predictions", "A", JANUARY),
        ("predictions", "B", FEBRUARY),
    ]
    assert {one["usage_period"] for one in found} == {JANUARY}
    late = {one["traceparent"] for one in found if one["due_period"] == FEBRUARY}
    assert late == {context(4).decode()}


async def test_an_invoice_takes_its_own_traces_once(tables: AsyncEngine) -> None:
    unit = batch(["A", "B"], ["predicted", "predicted"])
    async with tables.begin() as transaction:
        for _ in range(2):  # a unit that ran again
            await keep(transaction, traced(unit, [0, 1], [None, FEBRUARY]))
        taken = await taken_for(transaction, JANUARY)
        assert await taken_for(transaction, JANUARY) == {}
        late = await taken_for(transaction, FEBRUARY)
    assert taken == {"A": [(context(1), about("compute_ms")), (context(1), about("predictions"))]}
    assert [one for one, _ in late["B"]] == [context(2)] * 2


def about(meter: str) -> dict[str, str]:
    return {"causemesh.meter": meter, "causemesh.usage_period": JANUARY}


async def test_what_is_kept_and_taken_is_bounded(tables: AsyncEngine) -> None:
    """32 a tenant and month, whatever comes; the control: fewer are all there."""
    many = batch(["A"] * 200, ["failed"] * 200)
    few = batch(["B"] * 20, ["failed"] * 20)
    async with tables.begin() as transaction:
        for start in range(0, 200, 25):
            rows = range(start, start + 25)
            await keep(transaction, traced(many, rows, [None] * 200))
        await keep(transaction, traced(few, range(20), [None] * 20))
        stored: Any = await transaction.execute(
            sa.text("SELECT tenant_id, count(*) FROM usage_traces GROUP BY 1 ORDER BY 1")
        )
        counts = dict(tuple(row) for row in stored)
        taken = await taken_for(transaction, JANUARY)
    assert counts["A"] < 2 * 32
    assert counts["B"] == 20
    assert {tenant: len(traces) for tenant, traces in taken.items()} == {"A": 32, "B": 20}
