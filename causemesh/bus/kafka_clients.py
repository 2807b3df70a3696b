"""Starting aiokafka's clients whole."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from aiokafka.errors import KafkaError

from causemesh.errors import Retryable


async def started(client: Any, stop: Callable[[], Awaitable[None]] | None = None) -> None:
    """Start an aiokafka client, or stop it whole; `stop` where that is not `client.stop`.

    Raises Retryable when Kafka is away. Cut off half-way, aiokafka would leave its bootstrap
    connection open, so a start always runs to its end.
    """
    starting = asyncio.ensure_future(client.start())
    try:
        await asyncio.shield(starting)
    except BaseException as error:
        await asyncio.wait([starting])
        await (stop or client.stop)()
        if isinstance(error, KafkaError):
            raise Retryable(f"Kafka is away: {error!r}", retry_after=1.0) from error
        raise
