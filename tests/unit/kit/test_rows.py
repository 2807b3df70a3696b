"""JSON-like rows at the edges of the mesh: what fits goes in as it was meant, the rest is named."""

from __future__ import annotations

import io
import json
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import fastavro
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from causemesh.codec.rows import RowEncoder, fit
from causemesh.codec.wire import header

MICROS = {"type": "long", "logicalType": "timestamp-micros"}
MILLIS = {"type": "long", "logicalType": "timestamp-millis"}
DAY = {"type": "int", "logicalType": "date"}
MONEY = {"type": "bytes", "logicalType": "decimal", "precision": 9, "scale": 2}
COLOUR = {"type": "enum", "name": "Colour", "symbols": ["red", "green"]}
NAMED = {"type": "record", "name": "Named", "fields": [{"name": "name", "type": "string"}]}
NOON = datetime(2013, 7, 1, 12, tzinfo=UTC)


def record(**types: Any) -> dict[str, Any]:
    fields = [{"name": name, "type": kind} for name, kind in types.items()]
    return {"type": "record", "name": "R", "namespace": "t", "fields": fields}


def read(schema: dict[str, Any], value: bytes) -> Any:
    assert value[:5] == header(9)
    return fastavro.schemaless_reader(io.BytesIO(value[5:]), fastavro.parse_schema(schema), None)


def through(kind: Any, value: Any) -> Any:
    schema = record(f=kind)
    return read(schema, RowEncoder(schema, 9).encode({"f": value}))["f"]


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        (MICROS, "2013-07-01T12:00:00Z", NOON),
        (MICROS, "2013-07-01T14:00:00+02:00", NOON),
        (MICROS, "2013-07-01T12:00:00", NOON),
        (MICROS, round(NOON.timestamp() * 1e6), NOON),
        (MICROS, NOON.replace(tzinfo=None), NOON),
        (MICROS, NOON.astimezone(timezone(timedelta(hours=-5))), NOON),
        (MILLIS, round(NOON.timestamp() * 1e3), NOON),
        (["null", MICROS], "2013-07-01T12:00:00Z", NOON),
        (["null", MICROS], None, None),
        (DAY, "2013-07-01", date(2013, 7, 1)),
        (MONEY, "12.50", Decimal("12.50")),
        (COLOUR, "green", "green"),
        ("double", 3, 3.0),
        (["null", "string", "long"], 7, 7),
        ({"type": "array", "items": MICROS}, ["2013-07-01T12:00:00Z"], [NOON]),
        ({"type": "map", "values": "long"}, {"a": 1}, {"a": 1}),
        ({"type": "array", "items": NAMED}, [{"name": "x"}], [{"name": "x"}]),
    ],
)
def test_what_fits_is_written_as_meant(kind: Any, value: Any, expected: Any) -> None:
    assert through(kind, value) == expected


@pytest.mark.parametrize(
    ("kind", "value", "says"),
    [
        ("int", 1 << 31, "does not fit int"),
        ("long", -(1 << 63) - 1, "does not fit long"),
        ("int", True, "is no int"),
        ("int", 1.0, "is no int"),
        ("boolean", 1, "is no boolean"),
        ("string", 5, "is no string"),
        ("double", "5", "is no double"),
        ("string", None, "must not be null"),
        (MICROS, "yesterday", "isoformat"),
        (MICROS, True, "is no instant"),
        (MICROS, 1.5, "is no instant"),
        (DAY, "2013-02-30", "day"),
        (DAY, 5, "is no date"),
        (MONEY, "much", "is no decimal"),
        (COLOUR, "blue", "none of"),
        ({"type": "array", "items": "string"}, "abc", "is no list"),
        ({"type": "array", "items": "string"}, {"a": 1}, "is no list"),
        ({"type": "array", "items": "int"}, ["1"], "is no int"),
        ({"type": "map", "values": "string"}, ["a"], "is no object"),
        (NAMED, ["name"], "is no object"),
        (NAMED, "name", "is no object"),
        (NAMED, {"name": 3}, "name: 3 is no string"),
    ],
)
def test_what_does_not_fit_is_named(kind: Any, value: Any, says: str) -> None:
    for attempt in (fit, lambda schema, row: RowEncoder(schema, 9).encode(row)):
        with pytest.raises(ValueError, match=says) as refusal:
            attempt(record(f=kind), {"f": value})
        assert str(refusal.value).startswith("f: ")


def test_unknown_and_missing_fields_are_named() -> None:
    schema = record(a="string", b=["null", "long"])
    schema["fields"].append({"name": "c", "type": "int", "default": 4})
    assert fit(schema, {"a": "x"}) == {"a": "x", "b": None, "c": 4}
    with pytest.raises(ValueError, match="a is missing"):
        fit(schema, {"b": 1})
    with pytest.raises(ValueError, match=r"unknown fields \['d'\]; known: \['a', 'b', 'c'\]"):
        fit(schema, {"a": "x", "d": 1})


@pytest.mark.parametrize("row", [None, 5, "text", ["a"]])
def test_what_is_no_row_is_refused(row: Any) -> None:
    with pytest.raises(ValueError, match="is no object of fields"):
        fit(record(a="string"), row)


def test_a_long_value_does_not_fill_the_message() -> None:
    with pytest.raises(ValueError, match="xxx") as refusal:
        fit(record(f="int"), {"f": "x" * 100_000})
    assert len(str(refusal.value)) < 300


TEXT = st.text(st.characters(codec="utf-8"), max_size=8)
INSTANTS = st.datetimes(datetime(1970, 1, 1), datetime(2100, 1, 1), timezones=st.just(UTC))
LEAVES: list[tuple[Any, st.SearchStrategy[Any]]] = [
    ("string", TEXT),
    ("int", st.integers(-(1 << 31), (1 << 31) - 1)),
    ("long", st.integers(-(1 << 63), (1 << 63) - 1)),
    ("double", st.floats(allow_nan=False)),
    ("boolean", st.booleans()),
    (MICROS, INSTANTS),
    (DAY, st.dates()),
]


@st.composite
def typed(draw: Any, depth: int = 2) -> tuple[Any, st.SearchStrategy[Any]]:
    """An Avro type with the values that fastavro reads of it."""
    kind = draw(st.sampled_from(["leaf", "null", "array", "map"] if depth else ["leaf"]))
    avro, values = draw(st.sampled_from(LEAVES)) if kind == "leaf" else draw(typed(depth - 1))
    if kind == "null" and not isinstance(avro, list):
        return ["null", avro], st.none() | values
    if kind == "array":
        return {"type": "array", "items": avro}, st.lists(values, max_size=3)
    if kind == "map":
        return {"type": "map", "values": avro}, st.dictionaries(TEXT, values, max_size=3)
    return avro, values


@st.composite
def rows(draw: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    fields = [draw(typed()) for _ in range(draw(st.integers(1, 4)))]
    row = {f"f{n}": draw(values) for n, (_, values) in enumerate(fields)}
    return record(**{f"f{n}": avro for n, (avro, _) in enumerate(fields)}), row


def as_json(value: Any) -> Any:
    return value.isoformat()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(rows())
def test_a_row_through_json_is_what_fastavro_writes(
    case: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    schema, row = case
    stream = io.BytesIO()
    fastavro.schemaless_writer(stream, fastavro.parse_schema(schema), row)
    written = RowEncoder(schema, 9).encode(json.loads(json.dumps(row, default=as_json)))
    assert written == header(9) + stream.getvalue()
    assert read(schema, written) == row
