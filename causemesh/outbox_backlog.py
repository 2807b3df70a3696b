"""How much waits in a service's outbox, for metrics."""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine

from causemesh.sql import database_errors

# Two index steps a shard, however many rows wait.
_BACKLOG = sa.text(
    """
    SELECT coalesce(sum(heads.head - drains.drained), 0),
           coalesce(extract(epoch FROM clock_timestamp() - min(oldest.added_at)), 0)
    FROM outbox_heads AS heads
    JOIN outbox_drains AS drains USING (shard)
    LEFT JOIN LATERAL (
        SELECT added_at FROM outbox_rows AS waiting
        WHERE waiting.shard = drains.shard AND waiting.row_number > drains.drained
        ORDER BY waiting.row_number LIMIT 1
    ) AS oldest ON true
    """
)


@dataclass(frozen=True)
class Backlog:
    """Rows that were not sent yet, and the age of the oldest in seconds (0 when there is none)."""

    rows: int
    oldest_s: float


async def backlog(engine: AsyncEngine) -> Backlog:
    """What waits now, over all shards. Raises Retryable."""
    async with database_errors(), engine.connect() as connection:
        rows, oldest_s = (await connection.execute(_BACKLOG)).one()
    return Backlog(int(rows), max(float(oldest_s), 0.0))
