"""No field that was ever written is lost, whichever way a batch is decoded."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from polars.testing import assert_frame_equal

from causemesh.bus.record_blocks import LogBatch, RecordBlock
from causemesh.codec.decode import Decoder
from causemesh.codec.registry import MemoryRegistry
from causemesh.codec.wire import header
from services.features.lake.decoding import WidestDecoder
from tests.unit.codec.test_codec import SCHEMA, bodies, row
from tests.unit.record_batches import record_batch

COUNT = 40


def with_field(name: str) -> dict[str, Any]:
    """The schema with a text more."""
    more = {"name": name, "type": ["null", "string"], "default": None}
    return {**SCHEMA, "fields": [*SCHEMA["fields"], more]}


async def framed(registry: MemoryRegistry, schema: dict[str, Any], start: int) -> list[bytes]:
    schema_id = await registry.register("s", schema)
    names = {one["name"] for one in schema["fields"]} - {one["name"] for one in SCHEMA["fields"]}
    rows = [row(n) | {name: f"{name}{n}" for name in names} for n in range(start, start + COUNT)]
    return [header(schema_id) + body for body in bodies(schema, rows)]


def batch_of(*parts: list[bytes]) -> LogBatch:
    """Each part as a block of the log."""
    blocks, base = [], 0
    for values in parts:
        blocks.append(RecordBlock(record_batch(values, base=base)))
        base += len(values)
    return LogBatch("t", 0, blocks)


@pytest.mark.parametrize("kind", ["blocks", "in one block", "few"])
async def test_a_writer_that_is_new_behind_others(kind: str) -> None:
    registry = MemoryRegistry()
    old, newer = await framed(registry, SCHEMA, 0), await framed(registry, with_field("gate"), 40)
    parts = {"blocks": [old, newer, old], "in one block": [old + newer], "few": [old, newer[:3]]}
    batch = batch_of(*parts[kind])
    found = await WidestDecoder(Decoder(registry), registry).decode_log(batch, SCHEMA)
    values = list(batch.values)
    expected = await Decoder(registry).decode(values, with_field("gate"))
    assert_frame_equal(found.frame, expected.frame)
    assert found.rows.tolist() == list(range(len(values)))
    assert found.frame["gate"].drop_nulls().to_list()[:2] == ["gate40", "gate41"]
    assert not found.bad


async def test_blocks_of_known_writers_are_decoded_once_and_as_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    registry, taken = MemoryRegistry(), []
    decode_log, decode = Decoder.decode_log, Decoder.decode

    async def counted_log(self: Decoder, raw: Any, reader: Any) -> Any:
        taken.append("log")
        return await decode_log(self, raw, reader)

    async def counted(self: Decoder, values: Any, reader: Any) -> Any:
        taken.append("values")
        return await decode(self, values, reader)

    monkeypatch.setattr(Decoder, "decode_log", counted_log)
    monkeypatch.setattr(Decoder, "decode", counted)
    decoder = WidestDecoder(Decoder(registry), registry)
    batch = batch_of(await framed(registry, with_field("gate"), 0))
    await decoder.decode_log(batch, SCHEMA)
    assert taken == ["log", "log"]  # the first time its fields were not known
    await decoder.decode_log(batch, SCHEMA)
    assert taken == ["log", "log", "log"]


class SlowRegistry(MemoryRegistry):
    """Others get their turn while a schema is looked up."""

    async def schema(self, schema_id: int) -> dict[str, Any]:
        await asyncio.sleep(0)
        return await super().schema(schema_id)


async def test_two_workers_that_meet_new_writers_at_once() -> None:
    registry = SlowRegistry()
    decoder = WidestDecoder(Decoder(registry), registry)
    batches = [batch_of(await framed(registry, with_field(name), 0)) for name in ("gate", "runway")]
    await asyncio.gather(*(decoder.decode_log(batch, SCHEMA) for batch in batches))
    found = await decoder.decode_log(batch_of(await framed(registry, SCHEMA, 0)), SCHEMA)
    assert {"gate", "runway"} <= set(found.frame.columns)
