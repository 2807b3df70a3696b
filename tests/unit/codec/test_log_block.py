"""A block of the log decodes to what its records decode to one by one, or not as a block."""

from __future__ import annotations

from functools import partial
from typing import Any

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from causemesh.bus.base import TRACEPARENT
from causemesh.bus.record_blocks import LogBatch, RecordBlock
from causemesh.codec import decode as decoding
from causemesh.codec.block import BlockReader
from causemesh.codec.decode import Decoder
from causemesh.codec.log_block import LogBlockReader
from causemesh.codec.registry import MemoryRegistry
from causemesh.codec.wire import header
from tests.unit.codec.test_codec import SCHEMA, bodies, row
from tests.unit.codec.test_encode import by_fastavro, tables
from tests.unit.record_batches import record_batch

OTHER = {"type": "record", "name": "Other", "namespace": "test", "fields": SCHEMA["fields"][:1]}
COUNT = 40


async def both(registry: MemoryRegistry, schema: dict[str, Any], batch: LogBatch) -> Any:
    """What the block and the single values decode to, each by a decoder of its own."""
    found = await Decoder(registry).decode_log(batch, schema)
    return found, await Decoder(registry).decode(list(batch.values), schema)


def same(found: Any, expected: Any) -> None:
    assert found.rows.tolist() == expected.rows.tolist()
    assert found.bad == expected.bad
    assert found.foreign == expected.foreign
    assert_frame_equal(found.frame, expected.frame)


async def framed(registry: MemoryRegistry, schema: dict[str, Any], start: int) -> list[bytes]:
    schema_id = await registry.register(schema["name"], schema)
    rows = [row(number) for number in range(start, start + COUNT)]
    return [header(schema_id) + body for body in bodies(schema, rows)]


@pytest.fixture
def by_values(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many values each decoding took one by one."""
    taken: list[int] = []
    decode = Decoder.decode

    async def counted(self: Decoder, values: Any, reader: Any) -> Any:
        taken.append(len(values))
        return await decode(self, values, reader)

    monkeypatch.setattr(Decoder, "decode", counted)
    return taken


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(tables(), st.booleans(), st.booleans(), st.sampled_from([0, 3]))
async def test_random_records(table: Any, keyed: bool, traced: bool, codec: int) -> None:
    schema, rows = table
    rows = (rows * 20)[:25]
    registry = MemoryRegistry()
    schema_id = await registry.register("s", schema)
    values = [header(schema_id) + one[5:] for one in by_fastavro(schema, rows)]
    keys = [b"k%d" % n if keyed else None for n in range(len(values))]
    headers = [[(TRACEPARENT, b"t%d" % n)] if traced else [] for n in range(len(values))]
    block = RecordBlock(record_batch(values, keys=keys, headers=headers, codec=codec, base=7))
    batch = LogBatch("t", 0, [block])
    found = await Decoder(registry).decode_log(batch, schema)
    assert list(batch.keys) == keys
    assert batch.traceparents == ([one[0][1] for one in headers] if traced else None)
    same(found, await Decoder(registry).decode(values, schema))
    read = BlockReader(schema).read([value[5:] for value in values])
    # What polars can't read at all (an enum that may be null) it can't read as a block either.
    assert (block._columns is None) == (read is not None), "records were parsed by themselves"


async def test_blocks_of_several_kinds_in_one_batch(by_values: list[int]) -> None:
    registry = MemoryRegistry()
    older = {**SCHEMA, "fields": [one for one in SCHEMA["fields"] if one["name"] != "delay"]}
    other_id = await registry.register("Other", OTHER)
    parts, base = [], 0
    for values in (
        await framed(registry, SCHEMA, 0),
        [header(other_id) + b"\x02a"],
        await framed(registry, older, COUNT),
        [header(99) + b"abc", None, b"{}"],
        [header(other_id) + b"\x02a"] * COUNT,
        await framed(registry, SCHEMA, 2 * COUNT),
    ):
        parts.append(RecordBlock(record_batch(values, base=base)))
        base += len(values)
    found, expected = await both(registry, SCHEMA, LogBatch("t", 0, parts))
    same(found, expected)
    assert len(found.frame) == 3 * COUNT
    assert by_values[0] == 1 + 3 + COUNT  # what is not the reader's, one by one


def corrupted(kind: str, value: bytes) -> bytes:
    return {"short": value[:-1], "long": value + b"\x00", "empty": value[:5]}[kind]


@pytest.mark.parametrize("kind", ["short", "long", "empty"])
@pytest.mark.parametrize("at", [0, 7, COUNT - 1])
async def test_a_bad_body_is_isolated_as_ever(kind: str, at: int) -> None:
    registry = MemoryRegistry()
    values = await framed(registry, SCHEMA, 0)
    values[at] = corrupted(kind, values[at])
    batch = LogBatch("t", 0, [RecordBlock(record_batch(values))])
    found, expected = await both(registry, SCHEMA, batch)
    same(found, expected)
    assert list(found.bad) == [at]


@pytest.mark.parametrize("checked", [True, False])
async def test_shifted_bodies_are_noticed_by_what_surrounds_them(
    checked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A last body that is a byte too long decodes without an error: its last byte passes for the
    number of headers. The control arm takes it as it comes."""
    if not checked:
        monkeypatch.setattr(decoding, "LogBlockReader", partial(LogBlockReader, checked=False))
    registry = MemoryRegistry()
    values = await framed(registry, SCHEMA, 0)
    values[-1] = corrupted("long", values[-1])
    batch = LogBatch("t", 0, [RecordBlock(record_batch(values))])
    found = await Decoder(registry).decode_log(batch, SCHEMA)
    assert (list(found.bad) == [COUNT - 1]) == checked


async def test_mixed_writers_in_one_block_go_one_by_one(by_values: list[int]) -> None:
    registry = MemoryRegistry()
    newer = {
        **SCHEMA,
        "fields": [
            *SCHEMA["fields"],
            {"name": "gate", "type": ["null", "string"], "default": None},
        ],
    }
    values = [*await framed(registry, SCHEMA, 0), *await framed(registry, newer, COUNT)]
    batch = LogBatch("t", 0, [RecordBlock(record_batch(values))])
    found, expected = await both(registry, SCHEMA, batch)
    same(found, expected)
    assert len(found.frame) == 2 * COUNT == by_values[0]


@pytest.mark.parametrize("few", [True, False])
async def test_few_records_are_read_one_by_one(few: bool, by_values: list[int]) -> None:
    registry = MemoryRegistry()
    values = (await framed(registry, SCHEMA, 0))[: decoding._FEW + (not few)]
    found = await Decoder(registry).decode_log(
        LogBatch("t", 0, [RecordBlock(record_batch(values))]), SCHEMA
    )
    assert len(found.frame) == len(values)
    assert by_values == ([len(values)] if few else [])


async def test_values_above_the_limit_are_refused() -> None:
    registry = MemoryRegistry()
    values = await framed(registry, SCHEMA, 0)
    batch = LogBatch("t", 0, [RecordBlock(record_batch(values))])
    longest = max(map(len, values))
    found = await Decoder(registry, max_value_bytes=longest - 1).decode_log(batch, SCHEMA)
    assert set(found.bad) == {n for n, value in enumerate(values) if len(value) == longest}
    assert not (await Decoder(registry, max_value_bytes=longest).decode_log(batch, SCHEMA)).bad


async def test_a_reader_of_fewer_fields() -> None:
    registry = MemoryRegistry()
    values = await framed(registry, SCHEMA, 0)
    fewer = {**SCHEMA, "fields": [SCHEMA["fields"][3], SCHEMA["fields"][0]]}
    batch = LogBatch("t", 0, [RecordBlock(record_batch(values))])
    found, expected = await both(registry, fewer, batch)
    same(found, expected)
    assert found.frame.schema == pl.Schema({"seats": pl.Int32, "event_id": pl.String})
