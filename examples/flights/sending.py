"""Sending for sure: the broker may be away for a while."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from causemesh.errors import Retryable

_AWAY_S = 180.0


async def surely(
    send: Callable[..., Awaitable[Any]], *what: Any, told: Callable[[str, str], None]
) -> None:
    """`send(*what)`, and again while the broker is away; the door drops by its id what was written.

    Raises Retryable when it stays away for three minutes.
    """
    deadline = time.monotonic() + _AWAY_S
    while True:
        try:
            await send(*what)
        except Retryable as error:
            if time.monotonic() > deadline:
                raise
            told("producer", f"sends again: {error}")
            await asyncio.sleep(error.retry_after)
        else:
            return
