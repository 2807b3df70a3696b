"""Reports, alerts and closed days as people read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine

from causemesh.sql import database_errors
from services.drift.store import closed_days

FINDING_KEY = ("day", "model", "version", "number")
"""What names a report or an alert, and orders it."""


@dataclass(frozen=True)
class Wanted:
    """Which findings are asked for; None means any."""

    model: str | None = None
    version: int | None = None
    day: str | None = None


class Findings:
    """Reports and alerts as people read them: newest day first."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    async def page(
        self, table: sa.Table, wanted: Wanted, after: Sequence[Any] | None, limit: int
    ) -> list[dict[str, Any]]:
        """Up to `limit` rows of `reports` or `alerts` behind the key `after`. Raises Retryable."""
        order = [table.c[name] for name in FINDING_KEY]
        statement = sa.select(table).order_by(*(column.desc() for column in order)).limit(limit)
        for name, value in vars(wanted).items():
            if value is not None:
                statement = statement.where(table.c[name] == value)
        if after is not None:
            statement = statement.where(sa.tuple_(*order) < sa.tuple_(*after))
        async with database_errors(), self._engine.connect() as connection:
            return [dict(row) for row in (await connection.execute(statement)).mappings()]

    async def last_closed(self) -> dict[tuple[str, int], tuple[str, str | None]]:
        """The last closed day of each (model, version), and its problem. Raises Retryable."""
        columns = closed_days.c
        statement = (
            sa.select(columns.model, columns.version, columns.day, columns.problem)
            .distinct(columns.model, columns.version)
            .order_by(columns.model, columns.version, columns.day.desc())
        )
        async with database_errors(), self._engine.connect() as connection:
            rows = await connection.execute(statement)
            return {(row.model, row.version): (row.day, row.problem) for row in rows}
