"""Work that is done again and again: beside a service's runners, or until servers have started."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import structlog

from causemesh.clock import Clock
from causemesh.errors import Retryable

_log = structlog.get_logger(__name__)
_START_ATTEMPTS = 30
Found = TypeVar("Found")


async def patiently(work: Callable[[], Awaitable[Found]], attempts: int = _START_ATTEMPTS) -> Found:
    """Wait for servers that start beside us. Raises Retryable when they don't come."""
    for _ in range(attempts - 1):
        try:
            return await work()
        except Retryable as error:
            _log.info("waiting", reason=str(error))
            await asyncio.sleep(error.retry_after)
    return await work()


async def repeat(
    name: str, work: Callable[[], Awaitable[int | None]], clock: Clock, every_s: float
) -> None:
    """Do `work` every `every_s` seconds until cancelled, at once again while it gets things done.

    `work` returns how much it did; None where there is nothing to count, and nothing to hurry for.
    Retryable is waited for, as long as it asks; any other error ends the repetition.
    """
    while True:
        try:
            done = await work()
            pause_s = 0.0 if done else every_s
        except Retryable as error:
            _log.warning("work_waits", work=name, reason=str(error))
            pause_s = error.retry_after
        await clock.sleep(pause_s)
