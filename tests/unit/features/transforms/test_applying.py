"""A user's function on events: what it makes, what it may not, and what a replay does."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from causemesh.codec.rows import RowEncoder
from causemesh.derived import Transform
from services.features.transforms.applying import MAX_OUTPUTS, Applied, Applier, Given
from services.features.transforms.encoding import OutputEncoder
from services.features.transforms.loading import Event
from services.features.transforms.rows import Row, row_key, stored_form

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)
FIELDS = [("event_id", "string"), ("tenant_id", "string"), ("who", "string"), ("total", "long")]
RECORD = {
    "type": "record",
    "name": "Total",
    "fields": [
        *({"name": name, "type": kind} for name, kind in FIELDS),
        {"name": "occurred_at", "type": {"type": "long", "logicalType": "timestamp-micros"}},
        {
            "name": "cause",
            "type": {
                "type": "record",
                "name": "Cause",
                "fields": [
                    {"name": "topic", "type": "string"},
                    {"name": "partition", "type": "int"},
                    {"name": "position", "type": "long"},
                    {"name": "index", "type": "int"},
                    {"name": "origin", "type": ["null", "string"], "default": None},
                ],
            },
        },
    ],
}


async def totals(event: Any, table: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    table["total"] = table.get("total", 0) + event["amount"]
    if event["amount"] == 13:
        raise ValueError("thirteen")
    yield {"who": event["who"], "total": table["total"]}


def transform(scope: Any = "shared") -> Transform:
    return Transform("total", "who", ("paid",), "who", scope, Path("totals.py"), "totals")


def applier(function: Any = totals, scope: Any = "shared", timeout_s: float = 5.0) -> Applier:
    return Applier(transform(scope), function, OutputEncoder(RECORD, 7).encode, timeout_s)


def paid(position: int, who: str, amount: int, **more: Any) -> Given:
    event = {
        "event_id": f"e{position}",
        "tenant_id": more.get("tenant", "t"),
        "occurred_at": BEGIN + timedelta(seconds=position),
        "who": who,
        "amount": amount,
    }
    mark = (more.get("cause", position), 0)
    return Given(position, who.encode(), ("events.paid", 0), mark, Event("paid", event))


async def fold(events: list[Given], sizes: list[int], rows: dict[bytes, Row]) -> Applied:
    """The events in batches of these sizes; what they made together."""
    together = Applied(rows=rows)
    made = applier()
    left = list(events)
    for size in [*sizes, len(events)]:
        part, left = left[:size], left[size:]
        done = await made.apply(3, part, rows.get)
        rows.update(done.rows)
        together.values += done.values
        together.keys += done.keys
        together.replays += done.replays
    return together


@given(
    amounts=st.lists(st.tuples(st.sampled_from("abc"), st.integers(10, 15)), max_size=30),
    sizes=st.lists(st.integers(1, 9), max_size=6),
    seed=st.integers(0, 1_000),
)
async def test_replays_and_batches_change_nothing(
    amounts: list[tuple[str, int]], sizes: list[int], seed: int
) -> None:
    rng = random.Random(seed)
    events = [paid(n, who, amount) for n, (who, amount) in enumerate(amounts)]
    plain = await fold(events, [], {})
    # the sender goes back, any number of times, and says again what it had said
    again: list[Given] = []
    at = 0
    while at < len(events):
        step = rng.randint(1, 5)
        again += events[at : at + step]
        at += step
        if rng.random() < 0.5:
            at = rng.randint(max(0, at - 4), at)
    noisy = [Given(n, one.key, one.source, one.mark, one.event) for n, one in enumerate(again)]
    told = await fold(noisy, sizes, {})
    assert told.keys == plain.keys
    assert len(told.values) == len(plain.values)
    assert told.replays == len(again) - len(events)
    value = {key: row.value for key, row in told.rows.items()}
    assert value == {key: row.value for key, row in plain.rows.items()}


async def test_a_failure_leaves_the_table_and_the_next_goes_on() -> None:
    rows: dict[bytes, Row] = {}
    done = await applier().apply(0, [paid(0, "a", 1), paid(1, "a", 13), paid(2, "a", 2)], rows.get)
    assert done.failed == {1: "ValueError: thirteen"}
    assert json.loads(done.rows[b"sa"].value or "") == {"total": 3}
    assert len(done.values) == 2
    again = await applier().apply(0, [paid(5, "a", 13, cause=1)], done.rows.get)
    assert (again.replays, again.failed) == (1, {})


async def test_ids_are_made_from_the_cause_alone() -> None:
    first = await applier().apply(2, [paid(4, "a", 1), paid(9, "b", 2)], {}.get)
    second = await applier().apply(2, [paid(4, "a", 1)], {}.get)
    assert second.values == first.values[:1]
    assert len(set(first.values)) == 2
    other = await applier().apply(1, [paid(4, "a", 1)], {}.get)
    assert other.values != second.values


async def test_tenants_have_tables_of_their_own_unless_shared() -> None:
    events = [paid(0, "a", 1, tenant="x"), paid(1, "a", 2, tenant="y")]
    apart = await applier(scope="tenant").apply(0, events, {}.get)
    assert set(apart.rows) == {row_key("x", b"a"), row_key("y", b"a")}
    together = await applier().apply(0, events, {}.get)
    assert json.loads(together.rows[row_key(None, b"a")].value or "") == {"total": 3}


async def misfit(event: Any, table: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    yield {"who": event["who"], "total": "many"}


async def ours(event: Any, table: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    yield {"who": event["who"], "total": 1, "event_id": "mine"}


async def no_json(event: Any, table: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    table["at"] = event.occurred_at
    yield {"who": event["who"], "total": 1}


async def endless(event: Any, table: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    while True:
        yield {"who": event["who"], "total": 1}


async def slow(event: Any, table: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    await asyncio.sleep(9)
    yield {"who": event["who"], "total": 1}


async def large(event: Any, table: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    table["much"] = "x" * 300_000
    yield {"who": event["who"], "total": 1}


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (misfit, "ValueError: total: 'many' is no long"),
        (ours, "ValueError: ['event_id'] are set by the mesh"),
        (no_json, "ValueError: the table is no JSON"),
        (endless, f"ValueError: an event makes more than {MAX_OUTPUTS} events"),
        (slow, "TimeoutError"),
        (large, "ValueError: the table has"),
    ],
)
async def test_what_a_function_may_not_do_is_a_failure(function: Any, reason: str) -> None:
    done = await applier(function, timeout_s=0.1).apply(0, [paid(0, "a", 1)], {}.get)
    assert done.failed[0].startswith(reason)
    assert (done.values, done.rows[b"sa"].value) == ([], None)


def test_a_row_comes_back_from_its_record() -> None:
    row = Row(9, {("events.paid", 1): (4, 2), ("events.sold", 0): (7, 0)}, '{"n":1}')
    assert Row.of_record(row.fields()) == row
    assert row.table() == {"n": 1}
    assert row.seen(("events.paid", 1), (4, 2))
    assert not row.seen(("events.paid", 1), (4, 3))
    assert not row.seen(("events.paid", 0), (0, 0))


def test_a_table_is_json() -> None:
    assert stored_form({}) is None
    assert stored_form({"ü": [1, None, "x"]}) == '{"ü":[1,null,"x"]}'
    with pytest.raises(ValueError, match="JSON"):
        stored_form({"x": float("nan")})


@given(total=st.integers(-(2**70), 2**70), who=st.text(max_size=5), position=st.integers(0, 2**62))
def test_an_output_is_framed_as_any_record_is(total: int, who: str, position: int) -> None:
    """What looks at the user's fields alone writes, and refuses, what the kit's encoder does."""
    cause = {"topic": "t", "partition": 1, "position": position, "index": 0, "origin": None}
    envelope = {"event_id": "e", "tenant_id": "t", "occurred_at": BEGIN, "cause": cause}
    record = {**envelope, "who": who, "total": total}
    assert framed(OutputEncoder(RECORD, 7), record) == framed(RowEncoder(RECORD, 7), record)


def framed(encoder: RowEncoder | OutputEncoder, record: dict[str, Any]) -> bytes | str:
    try:
        return encoder.encode(record)
    except ValueError as error:
        return str(error)
