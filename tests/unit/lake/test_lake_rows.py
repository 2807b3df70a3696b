"""Rows of curated tables: expressions, filters, and a row for each item of an array."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest

from causemesh.catalogue import Catalogue
from causemesh.codec.columns import frame_schema
from causemesh.errors import Misdeclared
from causemesh.lake.definitions import TableDefinition, define_lake
from causemesh.lake.rows import curated_rows, table_columns

FLIGHTS = Path(__file__).parents[3] / "examples" / "flights"
INVOICES = "billing.invoices.v1"


def invoices(catalogue: Catalogue) -> pl.DataFrame:
    """Two invoices, the finalised one of two lines, the closed one of one."""
    record = catalogue.topic(INVOICES).record
    line: dict[str, Any] = {"usage_period": "2013-01", "ranges": []}
    lines = [
        {**line, "line_id": "l1", "meter": "predictions", "quantity_micro": 2_500_000,
         "amount_minor": 30},
        {**line, "line_id": "l2", "meter": "departures", "quantity_micro": 1_000_000,
         "amount_minor": 4},
    ]  # fmt: skip
    rows = [
        {"invoice_id": "i1", "status": "finalised", "lines": lines, "tenant_id": "UA"},
        {"invoice_id": "i2", "status": "closed", "lines": lines[:1], "tenant_id": "AA"},
        {"invoice_id": "i3", "status": "finalised", "lines": [], "tenant_id": "DL"},
    ]
    schema = {
        **frame_schema(record),
        "_partition": pl.Int32,
        "_position": pl.Int64,
        "_appended_at": pl.Datetime("us", "UTC"),
    }
    return pl.DataFrame(rows, schema=schema)


def test_each_item_of_an_array_is_a_row() -> None:
    catalogue = Catalogue.load([FLIGHTS])
    table = define_lake(catalogue, FLIGHTS).table("invoice_lines")
    found = curated_rows(table, invoices(catalogue))
    assert found["invoice_id"].to_list() == ["i1", "i1"]
    assert found["meter"].to_list() == ["predictions", "departures"]
    assert found["quantity"].to_list() == [2.5, 1.0]
    assert found["amount_minor"].to_list() == [30, 4]
    assert found.schema == table_columns(table, catalogue.topic(INVOICES))


def test_a_quoted_text_is_no_item() -> None:
    catalogue = Catalogue.load()
    columns = {"said": "CASE WHEN lines.meter = 'lines.meter' THEN 1 ELSE 0 END"}
    table = TableDefinition("curated", "x", INVOICES, 30, columns, None, "lines")
    assert curated_rows(table, invoices(catalogue))["said"].to_list() == [0, 0, 0]


def test_every_table_of_the_flights_has_columns() -> None:
    catalogue = Catalogue.load([FLIGHTS])
    for table in define_lake(catalogue, FLIGHTS).tables.values():
        columns = table_columns(table, catalogue.topic(table.topic))
        assert {"tenant_id", "occurred_at", "_partition", "_position"} <= set(columns)


@pytest.mark.parametrize(
    ("columns", "each", "message"),
    [
        ({"a": "nothing_here"}, None, "nothing_here"),
        ({"a": "lines.nothing_here"}, "lines", "nothing_here"),
        ({"a": "invoice_id"}, "nothing_here", "nothing_here"),
        ({"a": "invoice_id"}, "period", "period|explode|List"),
    ],
)
def test_an_expression_that_does_not_fit_is_refused_before_any_record(
    columns: dict[str, str], each: str | None, message: str
) -> None:
    catalogue = Catalogue.load()
    table = TableDefinition("curated", "mine", INVOICES, 30, columns, None, each)
    with pytest.raises(Misdeclared, match=f"(?s)curated.mine.*({message})"):
        table_columns(table, catalogue.topic(INVOICES))
