"""What a processor sees does not depend on where the fetches were cut."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from causemesh.bus.base import RawBatch
from causemesh.catalogue import WATERMARK, Catalogue
from causemesh.codec.decode import Decoder
from causemesh.codec.encode import Encoder
from causemesh.codec.registry import MemoryRegistry
from causemesh.runner import NEVER, Batch
from causemesh.runner.intake import Intake
from causemesh.runner.marks import HighWaterMarks
from causemesh.runner.watermarks import WatermarkTracker

CATALOGUE = Catalogue.load()
INBOX = CATALOGUE.topic("inbox.requests")
CONTROL = CATALOGUE.controls[WATERMARK]
SOURCE = (INBOX.name, 1)


def instants(*at_us: int) -> pl.Series:
    return pl.Series(at_us, dtype=pl.Int64).cast(pl.Datetime("us", "UTC"))


async def request(registry: MemoryRegistry) -> bytes:
    frame = pl.DataFrame(
        {
            "event_id": ["r"],
            "tenant_id": ["t"],
            "occurred_at": instants(5),
            "model": ["m"],
            "version": [None],
            "entities": [[]],
            "inputs": [[]],
            "mode": ["live"],
            "expires_at": [None],
        }
    )
    return Encoder(INBOX.record, await registry.register("r", INBOX.record)).encode(frame)[0]


async def watermark(
    registry: MemoryRegistry, at_us: int, partition: int = 1, schema: Any = CONTROL
) -> bytes:
    frame = pl.DataFrame(
        {
            "source_topic": [INBOX.name],
            "source_partition": [partition],
            "watermark_at": instants(at_us),
        }
    )
    if len(schema["fields"]) > 3:
        frame = frame.with_columns(pl.lit(None, dtype=pl.String).alias("note"))
    return Encoder(schema, await registry.register("w", schema)).encode(frame)[0]


def raw(first: int, values: list[bytes | None]) -> RawBatch:
    positions = np.arange(first, first + len(values), dtype=np.int64)
    return RawBatch(*SOURCE, positions, [None] * len(values), values, np.zeros_like(positions))


def fresh_intake(registry: MemoryRegistry) -> Intake:
    tracker = WatermarkTracker({SOURCE: [SOURCE]})
    return Intake(CATALOGUE, Decoder(registry), HighWaterMarks(), tracker)


@dataclass
class Seen:
    """Every row that reached the processor, with the watermark in force at it."""

    promised: list[tuple[int, int]]
    bad: list[tuple[int, str, int]]
    reached_us: int


async def seen(registry: MemoryRegistry, values: list[bytes | None], cuts: list[int]) -> Seen:
    intake = fresh_intake(registry)
    batches: list[Batch] = []
    for start, end in zip([0, *cuts], [*cuts, len(values)], strict=True):
        batches += await intake.take([raw(start, values[start:end])] if end > start else [])
    found = Seen([], [], intake._watermarks.least())
    for batch in batches:
        assert batch.promised_us is not None
        for row in batch.rows.tolist():
            found.promised.append((int(batch.raw.positions[row]), int(batch.promised_us[row])))
        for row, why in batch.bad.items():
            at = int(batch.raw.positions[row])
            found.bad.append((at, why, int(batch.promised_us[row])))
    found.bad.sort()
    return found


LOGS = st.lists(
    st.sampled_from(["request", "bad", "null"])
    | st.tuples(st.sampled_from([1, 1, 2]), st.integers(0, 60)),
    min_size=1,
    max_size=40,
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(LOGS, st.lists(st.integers(0, 40), max_size=6))
async def test_the_watermark_in_force_does_not_depend_on_the_cuts(
    log: list[Any], cuts: list[int]
) -> None:
    registry = MemoryRegistry()
    values: list[bytes | None] = []
    expected: list[tuple[int, int]] = []
    in_force = NEVER
    for position, one in enumerate(log):
        if isinstance(one, tuple):
            values.append(await watermark(registry, one[1], one[0]))
            in_force = max(in_force, one[1]) if one[0] == 1 else in_force
        elif one == "request":
            values.append(await request(registry))
            expected.append((position, in_force))
        else:
            values.append(b"{}" if one == "bad" else None)
    whole = await seen(registry, values, [])
    assert whole.promised == expected
    assert len(whole.bad) == sum(one in ("bad", "null") for one in log)
    assert await seen(registry, values, sorted({min(cut, len(log)) for cut in cuts})) == whole


async def test_two_versions_of_the_watermark_in_one_fetch_are_both_heard() -> None:
    registry = MemoryRegistry()
    note = {"name": "note", "type": ["null", "string"], "default": None}
    newer = {**CONTROL, "fields": [*CONTROL["fields"], note]}
    values = [
        await watermark(registry, 30),
        await request(registry),
        await watermark(registry, 20, schema=newer),
        await watermark(registry, 40),
        await request(registry),
    ]
    found = await seen(registry, [*values], [])
    assert found.promised == [(1, 30), (4, 40)]
    swapped = [values[2], values[1], await watermark(registry, 50, schema=newer), values[1]]
    assert (await seen(registry, [*swapped], [])).promised == [(1, 20), (3, 50)]
    mixed = [values[2], values[1], values[0], values[1]]
    assert (await seen(registry, [*mixed], [])).promised == [(1, 20), (3, 30)]


async def test_a_batch_of_bad_rows_is_kept_and_one_of_watermarks_is_not() -> None:
    registry = MemoryRegistry()
    intake = fresh_intake(registry)
    bad = raw(0, [b"{}", None])
    batches = await intake.take([bad])
    assert [sorted(batch.bad) for batch in batches] == [[0, 1]]
    assert (intake.counts.records, intake.counts.bad) == (2, 2)
    assert await intake.take([raw(2, [await watermark(registry, 3)])]) == []


@pytest.mark.parametrize(("count", "turns"), [(1_000, 3), (999, 0)])
async def test_others_get_their_turn_between_large_batches(count: int, turns: int) -> None:
    """A group drops a member whose heartbeats are late, and the unit may take longer than that."""
    registry = MemoryRegistry()
    intake, value, seen = fresh_intake(registry), await request(registry), 0
    await intake.take([raw(0, [value])])  # nothing is looked up from here on

    async def others() -> None:
        nonlocal seen
        while True:
            await asyncio.sleep(0)
            seen += 1

    task = asyncio.create_task(others())
    await asyncio.sleep(0)
    await intake.take([raw(1 + n * count, [value] * count) for n in range(3)])
    assert seen == turns
    task.cancel()
