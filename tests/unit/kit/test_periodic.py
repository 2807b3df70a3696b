"""Repeated work: its pace, its waits, and the errors that end it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from causemesh.clock import SystemClock
from causemesh.errors import Fatal, Retryable
from causemesh.periodic import repeat


class Waits(SystemClock):
    """Notes the pauses, and ends the repetition at the last of them."""

    def __init__(self, count: int) -> None:
        self.seconds: list[float] = []
        self._count = count

    async def sleep(self, seconds: float) -> None:
        self.seconds.append(seconds)
        if len(self.seconds) == self._count:
            raise asyncio.CancelledError


async def pauses(answers: Sequence[int | Exception | None]) -> list[float]:
    """The pauses behind work that answers so."""
    left = list(answers)

    async def work() -> int | None:
        answer = left.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    clock = Waits(len(answers))
    with pytest.raises(asyncio.CancelledError):
        await repeat("test", work, clock, 5.0)
    assert not left
    return clock.seconds


async def test_work_goes_on_while_it_gets_things_done() -> None:
    assert await pauses([0, 3, 1, 0, None]) == [5.0, 0.0, 0.0, 5.0, 5.0]


async def test_what_may_pass_is_waited_for() -> None:
    away = Retryable("away", retry_after=0.25)
    assert await pauses([away, away, 2, 0]) == [0.25, 0.25, 0.0, 5.0]


@pytest.mark.parametrize("error", [Fatal("wrong"), ValueError("a bug")])
async def test_any_other_error_ends_it(error: Exception) -> None:
    with pytest.raises(type(error)):
        await pauses([0, error, 0])
