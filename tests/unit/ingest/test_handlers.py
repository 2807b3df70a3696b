"""The door's processor: each id once, whatever the partitions, the cuts and the crashes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from causemesh.bus.base import RawBatch
from causemesh.catalogue import Catalogue
from causemesh.clock import SystemClock
from causemesh.runner import Batch, Emission
from services.ingest.domain import Rules
from services.ingest.handlers import REJECTS, Door
from services.ingest.store import IdClaims, Origin

INBOX = "inbox.reading"
CATALOGUE = Catalogue.load([Path(__file__).parents[3] / "tests" / "project"])
RULES = Rules(32 * 86_400_000_000, 300_000_000)
Logs = list[list[int]]
"""The ids that lie in each partition, in order."""


class Ids:
    """The id store in memory."""

    def __init__(self) -> None:
        self.owners: dict[bytes, Origin] = {}

    async def claim(self, claims: IdClaims) -> set[Origin]:
        asked = list(zip(claims.digests, claims.origins, strict=True))
        for digest, origin in asked:
            self.owners.setdefault(digest, origin)
        return {origin for digest, origin in asked if self.owners[digest] != origin}


class YoursToAll:
    """The control: a store that refuses nobody."""

    async def claim(self, claims: IdClaims) -> set[Origin]:
        return set()


class HandClock(SystemClock):
    now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s

    def now_us(self) -> int:
        return int(self.now_s * 1e6)


def batch(
    partition: int, start: int, ids: Sequence[str], bad: dict[int, str] | None = None
) -> Batch:
    count = len(ids)
    whole = count + len(bad or {})
    rows = np.array([row for row in range(whole) if row not in (bad or {})], dtype=np.int64)
    frame = pl.DataFrame(
        {
            "event_id": ids,
            "tenant_id": ["t"] * count,
            "occurred_at": pl.Series([0] * count).cast(pl.Datetime("us", "UTC")),
            "sensor": [f"s{one}" for one in ids],
            "site": pl.Series([None] * count, dtype=pl.String),
            "value": [1.0] * count,
        },
        schema_overrides={"event_id": pl.String, "tenant_id": pl.String, "value": pl.Float64},
    )
    positions = np.arange(start, start + whole)
    values = [f"{partition}/{position}".encode() for position in positions]
    raw = RawBatch(INBOX, partition, positions, [b"k"] * whole, values, np.zeros(whole, np.int64))
    return Batch(INBOX, partition, frame, rows, raw, bad or {})


def door(ids: object, clock: SystemClock | None = None) -> Door:
    return Door(CATALOGUE, [INBOX], ids=ids, rules=RULES, clock=clock or HandClock())  # type: ignore[arg-type]


def passed(emission: Emission) -> list[tuple[str, Origin]]:
    """The accepted ids with their causes."""
    return [
        (event_id, (part.cause_topic, part.cause_partition, int(position)))
        for part in emission.outgoing
        if part.topic == "events.reading"
        for event_id, position in zip(part.frame["event_id"], part.positions, strict=True)
    ]


async def through(store: object, logs: Logs, plan: Sequence[tuple[int, int, bool]]) -> Counter[str]:
    """How many different records each id was accepted with.

    A step of the plan is a partition, how many records a unit takes, and whether the process dies
    before the unit's position is stored: then the unit runs again, by a new process.
    """
    at = [0] * len(logs)
    causes: set[tuple[str, Origin]] = set()
    rest = [(number, len(log), False) for number, log in enumerate(logs)]
    for number, count, dies in [*plan, *rest]:
        ids = [str(one) for one in logs[number][at[number] : at[number] + count]]
        if ids:
            emission = await door(store).process([batch(number, at[number], ids)], 0, None)
            causes.update(passed(emission))
            at[number] += 0 if dies else len(ids)
    return Counter(event_id for event_id, _ in causes)


logs_of = st.lists(st.lists(st.integers(0, 8), max_size=12), min_size=2, max_size=2)
plans = st.lists(st.tuples(st.integers(0, 1), st.integers(1, 5), st.booleans()), max_size=12)


@settings(deadline=None)
@given(logs_of, plans)
async def test_each_id_is_accepted_with_one_record(
    logs: Logs, plan: list[tuple[int, int, bool]]
) -> None:
    counts = await through(Ids(), logs, plan)
    assert counts == Counter({str(one) for log in logs for one in log})


@pytest.mark.parametrize("store", [Ids(), YoursToAll()])
async def test_without_the_id_store_a_retry_counts_twice(store: object) -> None:
    counts = await through(store, [[1, 2], [2, 1, 1]], [(0, 1, False)])
    held = counts == {"1": 1, "2": 1}
    assert held == isinstance(store, Ids)


async def test_every_record_goes_to_one_place() -> None:
    unit = batch(2, 10, ["a", "b", "a"], bad={1: "not framed: x", 3: "does not decode: y"})
    emission = await door(Ids()).process([unit], 0, None)
    accepted, rejected = emission.outgoing
    assert passed(emission) == [("a", (INBOX, 2, 10)), ("b", (INBOX, 2, 12))]
    assert accepted.keys == [b"sa", b"sb"]
    assert rejected.topic == REJECTS
    told = list(zip(rejected.positions.tolist(), rejected.frame["reason"], strict=True))
    assert told == [(11, "not_framed"), (13, "undecodable"), (14, "duplicate")]
    assert rejected.frame["original_value"].to_list() == [b"2/11", b"2/13", b"2/14"]


async def test_promises_follow_the_records_and_then_the_clock() -> None:
    clock = HandClock()
    processor = door(Ids(), clock)
    lateness_us = CATALOGUE.event_types["reading"].progress.lateness_us
    assert (await processor.process([], 0, None)).promises == {}
    clock.now_s += 0.5
    busy = await processor.process([batch(0, 0, ["a"])], 0, None)
    assert busy.promises == {INBOX: -lateness_us}  # the batch was appended at 0
    clock.now_s += 0.9
    assert (await processor.process([], 0, None)).promises == busy.promises
    clock.now_s += 0.1
    quiet = (await processor.process([], 0, None)).promises
    assert quiet == {INBOX: 100_000_000 - lateness_us}  # 101.5 s, in whole steps of two
