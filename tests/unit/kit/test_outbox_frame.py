"""Rows of the outbox, which are JSON, become the columns that the emitter sends."""

from __future__ import annotations

import json
from typing import Any

import polars as pl
import pytest

from causemesh.catalogue import Catalogue
from causemesh.codec.columns import frame_schema
from causemesh.errors import Misdeclared
from causemesh.outbox import records_frame

MICROS = {"type": "long", "logicalType": "timestamp-micros"}
LINE = {
    "type": "record",
    "name": "Line",
    "fields": [{"name": "at", "type": MICROS}, {"name": "share", "type": "double"}],
}


def record(kind: Any, **more: Any) -> dict[str, Any]:
    field = {"name": "f", "type": kind, **more}
    return {"type": "record", "name": "R", "namespace": "t", "fields": [field]}


def column(kind: Any, *values: Any, **more: Any) -> pl.Series:
    rows = json.loads(json.dumps([{"f": value} for value in values]))
    return records_frame(record(kind, **more), rows)["f"]


@pytest.mark.parametrize(
    ("kind", "values", "dtype"),
    [
        ("long", [1, -(2**62)], pl.Int64),
        ("int", [1, None], pl.Int32),
        ("double", [2.5, 1, None], pl.Float64),
        ("boolean", [True, False], pl.Boolean),
        (["null", "string"], ["a", None], pl.String),
        ({"type": "array", "items": "double"}, [[1, 2.5], []], pl.List(pl.Float64)),
    ],
)
def test_json_keeps_its_values_under_the_records_types(
    kind: Any, values: list[Any], dtype: Any
) -> None:
    found = column(kind, *values)
    assert found.dtype == dtype
    assert found.to_list() == values


def test_instants_are_microseconds_also_inside_records() -> None:
    assert column(MICROS, 1_500_000, None).to_physical().to_list() == [1_500_000, None]
    inner = column({"type": "array", "items": LINE}, [{"at": 7, "share": 1}])
    line = inner.explode(empty_as_null=False, keep_nulls=False).struct
    assert line.field("at").to_physical().to_list() == [7]
    assert line.field("share").to_list() == [1.0]


def test_a_missing_field_takes_its_default() -> None:
    rows: list[dict[str, Any]] = [{}, {"f": 3}]
    assert records_frame(record("int", default=8), rows)["f"].to_list() == [8, 3]
    assert records_frame(record(["null", "int"]), rows)["f"].to_list() == [None, 3]


@pytest.mark.parametrize(("kind", "value"), [("int", 2**31), ("long", "7"), ("boolean", 1)])
def test_a_value_of_another_type_is_not_bent(kind: str, value: Any) -> None:
    with pytest.raises(TypeError):
        column(kind, value)


def test_bytes_are_refused_by_name() -> None:
    with pytest.raises(Misdeclared, match=r"R\.f: bytes"):
        column(["null", "bytes"], None)


def without_bytes() -> list[str]:
    topics = Catalogue.load().topics.values()
    return [one.name for one in topics if pl.Binary not in frame_schema(one.record).dtypes()]


@pytest.mark.parametrize("name", without_bytes())
def test_columns_are_those_of_the_record_less_what_is_derived(name: str) -> None:
    record = Catalogue.load().topic(name).record
    expected = dict(frame_schema(record))
    for derived in ("event_id", "cause"):
        expected.pop(derived, None)
    assert records_frame(record, []).schema == expected
