"""Columns in, columns out; bad records are isolated and their neighbours untouched."""

from __future__ import annotations

import io
import random
from datetime import UTC, datetime
from typing import Any

import fastavro
import polars as pl
import pytest

from causemesh.codec.block import BlockReader
from causemesh.codec.decode import Decoder
from causemesh.codec.encode import Encoder
from causemesh.codec.registry import MemoryRegistry
from causemesh.codec.wire import header

SCHEMA: dict[str, Any] = {
    "type": "record",
    "name": "Flight",
    "namespace": "test",
    "fields": [
        {"name": "event_id", "type": "string"},
        {"name": "occurred_at", "type": {"type": "long", "logicalType": "timestamp-micros"}},
        {"name": "delay", "type": ["null", "double"], "default": None},
        {"name": "seats", "type": "int"},
        {
            "name": "status",
            "type": {"type": "enum", "name": "Status", "symbols": ["early", "late"]},
        },
        {"name": "tags", "type": {"type": "array", "items": "string"}},
        {"name": "blob", "type": "bytes"},
        {
            "name": "cause",
            "type": {
                "type": "record",
                "name": "Cause",
                "fields": [
                    {"name": "topic", "type": "string"},
                    {"name": "position", "type": "long"},
                ],
            },
        },
    ],
}


def row(number: int) -> dict[str, Any]:
    return {
        "event_id": f"id-{number}",
        "occurred_at": datetime(2013, 1, 1, 0, 0, number % 60, number, tzinfo=UTC),
        "delay": None if number % 3 == 0 else number / 7,
        "seats": number * 1000 - 500,
        "status": "late" if number % 2 else "early",
        "tags": ["a"] * (number % 4),
        "blob": bytes(range(number % 7)),
        "cause": {"topic": "inbox.x", "position": number * 10**9},
    }


def bodies(schema: dict[str, Any], rows: list[dict[str, Any]]) -> list[bytes]:
    encoded = []
    for one in rows:
        stream = io.BytesIO()
        fastavro.schemaless_writer(stream, fastavro.parse_schema(schema), one)
        encoded.append(stream.getvalue())
    return encoded


async def framed(registry: MemoryRegistry, schema: dict[str, Any], count: int) -> list[bytes]:
    schema_id = await registry.register("s", schema)
    return [header(schema_id) + body for body in bodies(schema, [row(n) for n in range(count)])]


@pytest.mark.parametrize("count", [1, 2, 17, 300])
async def test_round_trip_through_columns(count: int) -> None:
    registry = MemoryRegistry()
    values = await framed(registry, SCHEMA, count)
    decoded = await Decoder(registry).decode(values, SCHEMA)
    assert decoded.bad == {}
    assert decoded.frame.to_dicts() == [row(n) for n in range(count)]
    assert Encoder(SCHEMA, 1).encode(decoded.frame) == values


async def test_older_and_newer_writers_in_one_batch() -> None:
    registry = MemoryRegistry()
    older = {**SCHEMA, "fields": [f for f in SCHEMA["fields"] if f["name"] != "delay"]}
    extra = {"name": "gate", "type": ["null", "string"], "default": None}
    newer = {**SCHEMA, "fields": [*SCHEMA["fields"], extra]}
    old, new = await framed(registry, older, 20), await framed(registry, newer, 20)
    mixed = [value for pair in zip(old, new, strict=True) for value in pair]
    decoded = await Decoder(registry).decode(mixed, SCHEMA)
    assert decoded.bad == {}
    assert decoded.rows.tolist() == list(range(40))
    assert decoded.frame["event_id"].to_list() == [f"id-{n // 2}" for n in range(40)]
    assert decoded.frame["delay"].to_list() == [
        row(n // 2)["delay"] if n % 2 else None for n in range(40)
    ]


async def test_reasons_for_what_is_not_ours() -> None:
    registry = MemoryRegistry()
    values: list[bytes | None] = [*await framed(registry, SCHEMA, 5)]
    values[0] = None
    values[1] = b"{}"
    values[2] = header(99) + b"abc"
    values[3] = (values[3] or b"") + b"\x00" * (1 << 20)
    decoded = await Decoder(registry).decode(values, SCHEMA)
    assert decoded.frame["event_id"].to_list() == ["id-4"]
    assert decoded.bad[0].startswith("not framed")
    assert decoded.bad[1].startswith("not framed")
    assert decoded.bad[2] == "schema id 99 is unknown"
    assert decoded.bad[3].startswith("oversize")


async def test_another_record_is_foreign_not_bad() -> None:
    registry = MemoryRegistry()
    other = {
        "type": "record",
        "name": "Other",
        "namespace": "test",
        "fields": [{"name": "a", "type": "int"}],
    }
    schema_id = await registry.register("o", other)
    values = [*await framed(registry, SCHEMA, 2), header(schema_id) + b"\x02"]
    decoded = await Decoder(registry).decode(values, SCHEMA)
    assert decoded.foreign == {"test.Other": [2]}
    assert len(decoded.frame) == 2


def corrupted(rng: random.Random, value: bytes) -> bytes:
    """Truncate, pad or flip one bit, behind the header."""
    kind = rng.randrange(3)
    if kind == 0:
        return value[: rng.randrange(5, len(value))]
    if kind == 1:
        return value + rng.randbytes(rng.randint(1, 9))
    at = rng.randrange(5, len(value))
    return value[:at] + bytes([value[at] ^ 1 << rng.randrange(8)]) + value[at + 1 :]


def strictly(body: bytes) -> dict[str, Any] | None:
    stream = io.BytesIO(body)
    try:
        read = fastavro.schemaless_reader(stream, fastavro.parse_schema(SCHEMA), None)
    except Exception:  # noqa: BLE001 - whatever fastavro raises means: not a record
        return None
    return read if stream.tell() == len(body) else None


@pytest.mark.parametrize("seed", range(60))
async def test_corruption_never_reaches_a_neighbour(seed: int) -> None:
    rng = random.Random(seed)
    registry = MemoryRegistry()
    values = await framed(registry, SCHEMA, 60)
    hit = sorted(rng.sample(range(60), rng.randint(1, 5)))
    for number in hit:
        values[number] = corrupted(rng, values[number])
    decoded = await Decoder(registry).decode(values, SCHEMA)
    got = dict(zip(decoded.rows.tolist(), decoded.frame.to_dicts(), strict=True))
    for number in range(60):
        if number not in hit:
            assert got[number] == row(number)
        elif strictly(values[number][5:]) is not None:
            assert number in got
    assert sorted([*got, *decoded.bad]) == list(range(60))


def test_without_the_guard_corruption_goes_unnoticed() -> None:
    rng = random.Random(7)
    unnoticed = 0
    for _ in range(200):
        rows = bodies(SCHEMA, [row(n) for n in range(60)])
        # A byte moves from one body to the next: the block's length stays right.
        at = rng.randrange(59)
        rows[at], rows[at + 1] = rows[at][:-1], rows[at][-1:] + rows[at + 1]
        read = BlockReader(SCHEMA, guarded=False).read(rows)
        unnoticed += read is not None and read[1] == 60
        guarded = BlockReader(SCHEMA).read(rows)
        assert guarded is None or guarded[1] < 60
    assert unnoticed > 0


def test_a_value_that_does_not_fit_names_its_row() -> None:
    frame = pl.DataFrame([row(0), {**row(1), "seats": None}], schema=None)
    with pytest.raises(ValueError, match="row 1"):
        Encoder(SCHEMA, 1).encode(frame)
