"""One bad row costs nothing but itself, and nothing is skipped silently."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl
import pytest

from causemesh.bus.base import RawBatch
from causemesh.errors import Fatal, Fenced, Poison, Retryable
from causemesh.runner import Batch, Emission, Limits
from causemesh.runner.deadletters import DeadRows, dead_letters
from causemesh.runner.faults import Faults


class NoWait:
    """Counts the waits and does not wait."""

    def __init__(self) -> None:
        self.slept: list[float] = []

    def now_us(self) -> int:
        return 0

    def monotonic(self) -> float:
        return 0.0

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)


class Plain:
    """A processor whose work is done by the test's attempt."""

    takes_bad_rows = False

    def __init__(self, *, stateful: bool = False) -> None:
        self.stateful = stateful

    async def process(
        self, batches: Sequence[Batch], watermark_us: int, transaction: Any
    ) -> Emission:
        return Emission()

    def snapshot(self) -> bytes | None:
        return None

    def restore(self, state: bytes | None) -> None:
        """Nothing to restore."""


def batch(numbers: list[int], bad: dict[int, str] | None = None) -> Batch:
    count = len(numbers)
    values = [b"v%d" % number for number in numbers]
    raw = RawBatch(
        "t", 0, np.arange(10, 10 + count), [b"k"] * count, values, np.zeros(count, np.int64)
    )
    keep = [row for row in range(count) if row not in (bad or {})]
    frame = pl.DataFrame({"n": [numbers[row] for row in keep]})
    return Batch("t", 0, frame, np.array(keep, dtype=np.int64), raw, bad or {})


class Work:
    """Raises for some numbers; records what one successful attempt saw."""

    def __init__(self, raising: dict[int, Exception]) -> None:
        self.raising = raising
        self.done: list[int] = []
        self.dead: DeadRows = []
        self.attempts = 0

    def check(self, batches: Sequence[Batch]) -> list[int]:
        numbers = [n for one in batches for n in one.frame["n"].to_list()]
        for number in numbers:
            if number in self.raising:
                raise self.raising[number]
        return numbers

    async def attempt(self, batches: Sequence[Batch], dead: DeadRows) -> None:
        self.attempts += 1
        self.done = self.check(batches)
        self.dead = list(dead)

    async def rehearse(self, batches: Sequence[Batch]) -> None:
        self.check(batches)


async def contain(work: Work, one: Batch, *, stateful: bool = False) -> NoWait:
    clock = NoWait()
    faults = Faults(clock, Limits(attempts=3))
    await faults.contain(Plain(stateful=stateful), [one], work.attempt, work.rehearse)
    return clock


async def test_an_unknown_error_costs_only_its_rows() -> None:
    work = Work({3: KeyError("x"), 5: ZeroDivisionError("by zero")})
    await contain(work, batch([1, 2, 3, 4, 5, 6]))
    assert work.done == [1, 2, 4, 6]
    [letters] = dead_letters("svc", work.dead)
    assert letters.positions.tolist() == [12, 14]
    assert letters.frame["reason"].to_list() == ["KeyError: 'x'", "ZeroDivisionError: by zero"]
    assert letters.frame["original_value"].to_list() == [b"v3", b"v5"]


async def test_rows_that_do_not_decode_are_dead_lettered_in_position_order() -> None:
    work = Work({4: ValueError("no")})
    await contain(work, batch([1, 2, 3, 4], bad={2: "truncated"}))
    assert work.done == [1, 2]
    [letters] = dead_letters("svc", work.dead)
    assert letters.frame["reason"].to_list() == ["truncated", "ValueError: no"]


async def test_poison_names_its_rows_without_retries() -> None:
    work = Work({2: Poison({1: "negative"})})
    clock = await contain(work, batch([1, 2, 3]))
    assert work.done == [1, 3]
    assert clock.slept == []


async def test_retryable_waits_as_it_says_and_loses_nothing() -> None:
    work = Work({1: Retryable("away", retry_after=7.0)})
    clock = NoWait()

    async def attempt(batches: Sequence[Batch], dead: DeadRows) -> None:
        if len(clock.slept) == 5:
            work.raising = {}
        await work.attempt(batches, dead)

    await Faults(clock, Limits()).contain(Plain(), [batch([1])], attempt, work.rehearse)
    assert clock.slept == [7.0] * 5
    assert work.done == [1]


@pytest.mark.parametrize("error", [Fenced("replaced"), Fatal("broken")])
async def test_fatal_errors_are_never_contained(error: Exception) -> None:
    work = Work({1: error})
    with pytest.raises(type(error)):
        await contain(work, batch([1, 2]))
    assert work.attempts == 1


async def test_a_stateful_processor_is_not_repeated_in_place() -> None:
    work = Work({1: KeyError("x")})
    with pytest.raises(Fatal, match="unknown error"):
        await contain(work, batch([1, 2]), stateful=True)
    assert work.attempts == 1


async def test_an_error_of_no_single_row_stops_the_worker() -> None:
    work = Work({})

    async def attempt(batches: Sequence[Batch], dead: DeadRows) -> None:
        raise KeyError("always")

    with pytest.raises(Fatal, match="none of its rows"):
        await Faults(NoWait(), Limits()).contain(Plain(), [batch([1, 2])], attempt, work.rehearse)
