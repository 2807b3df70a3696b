"""The columnar encoder writes what fastavro writes, and refuses what does not fit."""

from __future__ import annotations

import io
from datetime import UTC, date, datetime
from typing import Any

import fastavro
import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from causemesh.catalogue import Catalogue
from causemesh.codec.columnar_conform import MisfitError
from causemesh.codec.columnar_pieces import Uneven, constant, interleave, packed, where
from causemesh.codec.columns import frame_schema
from causemesh.codec.encode import FEW_ROWS, ColumnwiseEncoder, Encoder, RowwiseEncoder
from causemesh.codec.varint import varints
from causemesh.codec.wire import header

I64 = st.integers(-(2**63), 2**63 - 1) | st.integers(-300, 300)
I32 = st.integers(-(2**31), 2**31 - 1) | st.integers(-70, 70)
TEXT = st.text(max_size=12) | st.text(min_size=60, max_size=140)
# Within Python's datetime, as fastavro sees nested instants.
MICROS = st.integers(-(10**15), 10**16)


def enum(name: str) -> dict[str, Any]:
    return {"type": "enum", "name": name, "symbols": ["red", "green", "blue"]}


def record(name: str, *fields: tuple[str, Any]) -> dict[str, Any]:
    return {"type": "record", "name": name, "fields": [{"name": n, "type": t} for n, t in fields]}


INSTANT = {"type": "long", "logicalType": "timestamp-micros"}
MILLIS = {"type": "long", "logicalType": "timestamp-millis"}
DAY = {"type": "int", "logicalType": "date"}
LEAVES: list[tuple[Any, st.SearchStrategy[Any]]] = [
    ("long", I64),
    ("int", I32),
    ("double", st.floats(allow_nan=False)),
    ("float", st.floats(width=32, allow_nan=False)),
    ("boolean", st.booleans()),
    ("string", TEXT),
    ("bytes", st.binary(max_size=90)),
    ("enum", st.sampled_from(["red", "green", "blue"])),
    ("fixed", st.binary(min_size=3, max_size=3)),
    (
        INSTANT,
        MICROS.map(lambda us: datetime.fromtimestamp(0, UTC) + np.timedelta64(us, "us").item()),
    ),
    (MILLIS, MICROS.map(lambda us: datetime.fromtimestamp(us // 10**6, UTC))),
    (DAY, st.dates(date(1900, 1, 1), date(2200, 1, 1))),
    ({"type": "string", "logicalType": "uuid"}, st.uuids().map(str)),
]


class Names:
    """Fresh names: Avro wants every named type once."""

    def __init__(self) -> None:
        self.used = 0

    def fresh(self) -> str:
        self.used += 1
        return f"n{self.used}"


def typed(draw: Any, names: Names, depth: int) -> tuple[Any, st.SearchStrategy[Any]]:
    """A random type of the columnar subset, and its values."""
    kind = draw(st.sampled_from(["leaf"] * 3 + ["null", "record", "array"] * (depth > 0)))
    if kind == "null":
        avro, values = typed(draw, names, depth - 1)
        return (avro, values) if isinstance(avro, list) else (["null", avro], st.none() | values)
    if kind == "record":
        fields = [
            (names.fresh(), *typed(draw, names, depth - 1)) for _ in range(draw(st.integers(1, 3)))
        ]
        avro = record(names.fresh(), *((name, kind) for name, kind, _ in fields))
        return avro, st.fixed_dictionaries({name: values for name, _, values in fields})
    if kind == "array":
        avro, values = typed(draw, names, depth - 1)
        return {"type": "array", "items": avro}, st.lists(values, max_size=4)
    avro, values = draw(st.sampled_from(LEAVES))
    if avro == "enum":
        return enum(names.fresh()), values
    if avro == "fixed":
        return {"type": "fixed", "name": names.fresh(), "size": 3}, values
    return avro, values


@st.composite
def tables(draw: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A random schema and rows of it."""
    names = Names()
    fields = [(names.fresh(), *typed(draw, names, 3)) for _ in range(draw(st.integers(1, 5)))]
    schema = record("Row", *((name, avro) for name, avro, _ in fields))
    row = st.fixed_dictionaries({name: values for name, _, values in fields})
    return schema, draw(st.lists(row, min_size=1, max_size=9))


def by_fastavro(schema: dict[str, Any], rows: list[dict[str, Any]]) -> list[bytes]:
    parsed, encoded = fastavro.parse_schema(schema), []
    for row in rows:
        stream = io.BytesIO()
        fastavro.schemaless_writer(stream, parsed, row)
        encoded.append(header(7) + stream.getvalue())
    return encoded


def frame_of(schema: dict[str, Any], rows: list[dict[str, Any]]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema=frame_schema(schema), orient="row")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(tables())
def test_bytes_are_those_of_fastavro(table: tuple[dict[str, Any], list[dict[str, Any]]]) -> None:
    schema, rows = table
    expected, frame = by_fastavro(schema, rows), frame_of(schema, rows)
    assert ColumnwiseEncoder(schema, 7).encode(frame) == expected
    assert RowwiseEncoder(schema, 7).encode(frame) == expected
    assert Encoder(schema, 7).encode(frame) == expected


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(tables(), st.data())
def test_a_null_is_refused_by_columns_exactly_where_by_rows(
    table: tuple[dict[str, Any], list[dict[str, Any]]], data: st.DataObject
) -> None:
    schema, rows = table
    number = data.draw(st.integers(0, len(rows) - 1))
    field = data.draw(st.sampled_from(schema["fields"]))
    rows[number] = {**rows[number], field["name"]: None}
    frame, encoder = frame_of(schema, rows), Encoder(schema, 7)
    if isinstance(field["type"], list):
        assert encoder.encode(frame) == by_fastavro(schema, rows)
        return
    for attempt in (encoder.encode, ColumnwiseEncoder(schema, 7).encode):
        with pytest.raises(MisfitError) as refusal:
            attempt(frame)
        assert (refusal.value.row, refusal.value.path) == (number, field["name"])


@pytest.mark.parametrize("name", [*Catalogue.load().topics])
def test_every_mesh_record_is_columnar(name: str) -> None:
    topic = Catalogue.load().topics[name]
    if topic.form != "inbox":
        ColumnwiseEncoder(topic.record, 1)


def test_varints_at_every_length_border() -> None:
    borders = [0, 1, -1, 2**63 - 1, -(2**63)]
    borders += [
        sign * 2 ** (7 * k - 1) + d for k in range(1, 10) for d in (-1, 0, 1) for sign in (1, -1)
    ]
    schema = record("V", ("v", "long"))
    expected = [value[5:] for value in by_fastavro(schema, [{"v": v} for v in borders])]
    for chosen in (borders, *([b] for b in borders)):
        data, stride, lengths = varints(np.array(chosen, dtype=np.int64))
        got = [data[i * stride : i * stride + n].tobytes() for i, n in enumerate(lengths)]
        assert got == [expected[borders.index(b)] for b in chosen]


def test_interleave_copies_every_length() -> None:
    rng = np.random.default_rng(1)
    sizes = rng.permutation(np.arange(300))
    parts = [rng.bytes(n) for n in sizes]
    mask = rng.random(300) < 0.5
    pieces = [
        constant(b"ab"),
        packed(b"".join(parts), sizes.astype(np.int64)),
        where(mask, constant(b"xyz")),
        constant(b"!"),
    ]
    data, ends = interleave(pieces, 300)
    expected = [b"ab" + p + b"xyz" * int(m) + b"!" for p, m in zip(parts, mask, strict=True)]
    assert data.tobytes() == b"".join(expected)
    assert np.diff(ends, prepend=0).tolist() == [len(row) for row in expected]
    assert isinstance(pieces[1], Uneven)


WIDE = record(
    "Wide",
    ("id", "string"),
    ("count", "int"),
    ("ok", "boolean"),
    ("colour", enum("Colour")),
    ("hash", {"type": "fixed", "name": "Hash", "size": 2}),
    ("score", ["null", "double"]),
    ("cause", record("Cause", ("topic", "string"), ("partition", "int"))),
    ("pairs", {"type": "array", "items": record("Pair", ("name", "string"), ("n", "int"))}),
)


def wide(number: int, **other: Any) -> dict[str, Any]:
    base = {
        "id": f"id-{number}",
        "count": number,
        "ok": True,
        "colour": "red",
        "hash": b"ab",
        "score": None,
        "cause": {"topic": "t", "partition": 1},
        "pairs": [{"name": "p", "n": 1}] * (number % 3),
    }
    return {**base, **other}


BAD: list[tuple[str, Any, str]] = [
    ("id", None, "column id: it is null"),
    ("ok", None, "column ok: it is null"),
    ("count", 2**31, "column count: 2147483648 is out of range"),
    ("colour", "pink", "column colour: it is none of red, green, blue"),
    ("hash", b"abc", "column hash: it has 3 bytes, not 2"),
    ("cause", None, "column cause: it is null"),
    ("cause", {"topic": None, "partition": 1}, "column cause.topic: it is null"),
    ("cause", {"topic": "t", "partition": -(2**40)}, "column cause: .* is out of range"),
    ("pairs", None, "column pairs: it is null"),
    ("pairs", [{"name": None, "n": 1}], r"column pairs\[\].name: it is null"),
]


@pytest.mark.parametrize("count", [6, FEW_ROWS + 20])
@pytest.mark.parametrize(("name", "value", "why"), BAD)
def test_a_bad_value_names_its_row_and_column(count: int, name: str, value: Any, why: str) -> None:
    rows = [wide(n) for n in range(count)]
    inferred = {"strict": False, "infer_schema_length": None}
    good = pl.DataFrame(rows, **inferred)  # type: ignore[arg-type]
    assert Encoder(WIDE, 7).encode(good) == by_fastavro(WIDE, rows)
    rows[4] = wide(4, **{name: value})
    frame = pl.DataFrame(rows, **inferred)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"^row 4 does not fit its schema: {why}"):
        Encoder(WIDE, 7).encode(frame)


@pytest.mark.parametrize("count", [6, FEW_ROWS + 20])
def test_the_first_bad_row_is_named_whatever_its_column(count: int) -> None:
    rows = [wide(n) for n in range(count)]
    rows[5] = wide(5, id=None, count=2**40)
    rows[3] = wide(3, colour="pink")
    frame = pl.DataFrame(rows, strict=False, infer_schema_length=None)
    with pytest.raises(ValueError, match=r"^row 3 .* column colour"):
        Encoder(WIDE, 7).encode(frame)


@pytest.mark.parametrize(
    ("name", "series", "why"),
    [
        ("id", [1, 2], "column id: its type is Int64, which is not String"),
        ("count", [1.0, 2.0], "column count: its type is Float64"),
        ("ok", [1, 0], "column ok: its type is Int64"),
        ("score", ["a", "b"], "column score: its type is String"),
        ("hash", ["ab", "cd"], "column hash: its type is String"),
        ("cause", [{"topic": 1, "partition": 1}] * 2, "column cause.topic: its type is Int64"),
        ("pairs", [[{"name": "p", "n": "1"}]] * 2, r"column pairs\[\].n: its type is String"),
    ],
)
def test_a_column_of_another_type_is_refused(name: str, series: list[Any], why: str) -> None:
    frame = frame_of(WIDE, [wide(1), wide(2)]).with_columns(pl.Series(name, series))
    with pytest.raises(ValueError, match=f"^row 0 does not fit its schema: {why}"):
        Encoder(WIDE, 7).encode(frame)


@pytest.mark.parametrize("count", [3, FEW_ROWS + 1])
def test_a_null_is_never_taken_for_false(count: int) -> None:
    schema = record("R", ("c", record("C", ("b", "boolean"))))
    rows: list[dict[str, Any]] = [{"c": {"b": True}} for _ in range(count)]
    rows[1]["c"]["b"] = None
    assert RowwiseEncoder(schema, 7).encode(frame_of(schema, rows))[1] == header(7) + b"\x00"
    with pytest.raises(ValueError, match=r"^row 1 .* column c\.b: it is null"):
        Encoder(schema, 7).encode(frame_of(schema, rows))


def test_a_missing_column_is_named() -> None:
    with pytest.raises(ValueError, match="column ok is missing"):
        Encoder(WIDE, 7).encode(frame_of(WIDE, [wide(1)]).drop("ok"))


@pytest.mark.parametrize("count", [3, FEW_ROWS + 1])
def test_columns_that_hold_the_same_values_pass(count: int) -> None:
    rows = [wide(n, score=float(n)) for n in range(count)]
    frame = frame_of(WIDE, rows).select(
        pl.lit(1).alias("unused"),
        pl.col("pairs").list.eval(
            pl.struct(
                pl.element().struct.field("n").cast(pl.UInt64), pl.element().struct.field("name")
            )
        ),
        pl.struct(
            pl.col("cause").struct.field("partition").cast(pl.Int64),
            pl.col("cause").struct.field("topic").cast(pl.Categorical),
        ).alias("cause"),
        pl.col("score").cast(pl.Int16),
        pl.col("colour").cast(pl.Enum(["blue", "green", "red"])),
        pl.col("id", "ok", "hash"),
        pl.col("count").cast(pl.Int8, strict=False).fill_null(0),
    )
    expected = [{**row, "count": row["count"] if row["count"] < 128 else 0} for row in rows]
    assert Encoder(WIDE, 7).encode(frame) == by_fastavro(WIDE, expected)


@pytest.mark.parametrize("count", [2, FEW_ROWS])
def test_instants_of_any_unit_and_zone(count: int) -> None:
    schema = record("At", ("at", INSTANT), ("or", ["null", MILLIS]))
    moment = datetime(2013, 7, 1, 12, 0, 0, 123000, tzinfo=UTC)
    expected = by_fastavro(schema, [{"at": moment, "or": moment}] * count)
    exact = pl.Series([moment] * count)
    for at in (
        exact.cast(pl.Datetime("ms", "UTC")),
        exact.cast(pl.Datetime("ns", "Europe/Paris")),
        exact.dt.replace_time_zone(None),
        exact.to_physical(),
    ):
        frame = pl.DataFrame({"at": at, "or": exact.cast(pl.Datetime("us", "America/New_York"))})
        assert Encoder(schema, 7).encode(frame) == expected


@pytest.mark.parametrize("count", [2, FEW_ROWS])
def test_a_nested_field_that_is_left_out_is_null(count: int) -> None:
    schema = record("R", ("c", record("C", ("a", "int"), ("b", ["null", "string"]))))
    frame = pl.DataFrame({"c": [{"a": 1}] * count})
    expected = by_fastavro(schema, [{"c": {"a": 1, "b": None}}] * count)
    assert Encoder(schema, 7).encode(frame) == expected


def test_no_rows() -> None:
    assert Encoder(WIDE, 7).encode(frame_of(WIDE, [])) == []
    assert ColumnwiseEncoder(WIDE, 7).encode(frame_of(WIDE, [])) == []


def test_slices_and_chunks_encode_like_whole_frames() -> None:
    rows = [wide(n) for n in range(40)]
    frame = pl.concat([frame_of(WIDE, rows[:7]), frame_of(WIDE, rows[7:])], rechunk=False)
    assert ColumnwiseEncoder(WIDE, 7).encode(frame.slice(5, 20)) == by_fastavro(WIDE, rows[5:25])


def test_types_outside_the_columns_go_row_by_row() -> None:
    schema = record(
        "Odd",
        ("price", {"type": "bytes", "logicalType": "decimal", "precision": 9, "scale": 2}),
        ("either", ["string", "null"]),
        ("at", ["null", INSTANT]),
    )
    moment = datetime(2013, 7, 1, tzinfo=UTC)
    frame = pl.DataFrame(
        {"price": ["1.25", "-3.00"], "either": ["a", None], "at": [moment, None]},
    ).with_columns(
        pl.col("price").cast(pl.Decimal(9, 2)), pl.col("at").cast(pl.Datetime("ms", "UTC"))
    )
    expected = by_fastavro(schema, frame.to_dicts())
    assert Encoder(schema, 7).encode(frame) == expected
    with pytest.raises(ValueError, match=r"^row 1 does not fit"):
        Encoder(schema, 7).encode(frame.with_columns(price=pl.Series([b"1", None])))
