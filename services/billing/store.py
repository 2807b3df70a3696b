"""Usage as the workers write it and closing reads it, and the tenants it was seen of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from causemesh.positions import Checkpoint
from causemesh.positions_sql import checkpoints
from causemesh.sql import database_errors
from services.billing.domain.members import MEMBER_SCHEMA
from services.billing.domain.metering import USAGE_SCHEMA
from services.billing.tables import (
    closed_months,
    metadata,
    tenants,
    usage_buckets,
    usage_members,
)

__all__ = ["Before", "HourlyUsage", "Known", "UsageStore", "arrays", "metadata"]

# Rows go in by key: workers only meet on tenants, and then in one order.
_ADD_USAGE = sa.text(
    """
    INSERT INTO usage_buckets AS known (
        tenant_id, meter, aggregation, topic, partition, hour_us, due_period, usage_period,
        quantity_micro, first, last, at_us, at_position
    )
    SELECT * FROM unnest(
        CAST(:tenant_id AS text[]), CAST(:meter AS text[]), CAST(:aggregation AS text[]),
        CAST(:topic AS text[]), CAST(:partition AS int[]), CAST(:hour_us AS bigint[]),
        CAST(:due_period AS text[]), CAST(:usage_period AS text[]),
        CAST(:quantity_micro AS bigint[]), CAST(:first AS bigint[]), CAST(:last AS bigint[]),
        CAST(:at_us AS bigint[]), CAST(:at_position AS bigint[])
    )
    ON CONFLICT (tenant_id, meter, aggregation, topic, partition, hour_us, due_period) DO UPDATE
    SET quantity_micro = CASE known.aggregation
            WHEN 'max' THEN greatest(known.quantity_micro, excluded.quantity_micro)
            WHEN 'latest' THEN CASE
                WHEN (excluded.at_us, excluded.at_position) > (known.at_us, known.at_position)
                THEN excluded.quantity_micro ELSE known.quantity_micro END
            ELSE known.quantity_micro + excluded.quantity_micro END,
        first = least(known.first, excluded.first),
        last = greatest(known.last, excluded.last),
        at_us = greatest(known.at_us, excluded.at_us),
        at_position = CASE
            WHEN (excluded.at_us, excluded.at_position) > (known.at_us, known.at_position)
            THEN excluded.at_position ELSE known.at_position END
    """
)
# Positions only rise, and with them what is due: the first time a member is seen is the least.
_ADD_MEMBERS = sa.text(
    """
    INSERT INTO usage_members (
        tenant_id, meter, hour_us, partition, hash64, due_period, usage_period
    )
    SELECT * FROM unnest(
        CAST(:tenant_id AS text[]), CAST(:meter AS text[]), CAST(:hour_us AS bigint[]),
        CAST(:partition AS int[]), CAST(:hash64 AS bigint[]), CAST(:due_period AS text[]),
        CAST(:usage_period AS text[])
    )
    ON CONFLICT DO NOTHING
    """
)
_MEET = sa.text(
    """
    INSERT INTO tenants (tenant_id, plan, sequence)
    SELECT tenant_id, plan, 1
    FROM unnest(CAST(:tenants AS text[]), CAST(:plans AS text[])) AS met (tenant_id, plan)
    ORDER BY tenant_id
    ON CONFLICT DO NOTHING
    RETURNING tenant_id
    """
)
# A loose index scan: a step of the index a month, however many buckets there are.
_DUE_MONTHS = sa.text(
    """
    WITH RECURSIVE months (month) AS (
        SELECT min(due_period) FROM usage_buckets
        UNION ALL
        SELECT (SELECT min(due_period) FROM usage_buckets WHERE due_period > month)
        FROM months WHERE month IS NOT NULL
    )
    SELECT month FROM months WHERE month IS NOT NULL
    """
)
_HOURLY = sa.text(
    """
    SELECT tenant_id, meter, aggregation, hour_us, CASE aggregation
        WHEN 'max' THEN max(quantity_micro)
        WHEN 'latest' THEN
            (array_agg(quantity_micro ORDER BY at_us DESC, at_position DESC, partition DESC))[1]
        WHEN 'unique' THEN 1000000 * (
            SELECT count(DISTINCT hash64) FROM usage_members AS member
            WHERE member.tenant_id = bucket.tenant_id AND member.meter = bucket.meter
                  AND member.hour_us = bucket.hour_us)
        ELSE CAST(sum(quantity_micro) AS bigint) END AS quantity_micro
    FROM usage_buckets AS bucket
    WHERE (CAST(:tenant AS text) IS NULL OR tenant_id = :tenant)
          AND (CAST(:meter AS text) IS NULL OR meter = :meter)
          AND (CAST(:from_us AS bigint) IS NULL OR hour_us >= :from_us)
          AND (CAST(:to_us AS bigint) IS NULL OR hour_us < :to_us)
          AND (CAST(:after_us AS bigint) IS NULL
               OR (hour_us, tenant_id, meter) > (:after_us, :after_tenant, :after_meter))
    GROUP BY tenant_id, meter, aggregation, hour_us
    ORDER BY hour_us, tenant_id, meter, aggregation
    LIMIT :limit
    """
)


@dataclass(frozen=True)
class Before:
    """What was committed before a unit: its partition's promises, and the last closed month."""

    promises: Sequence[Sequence[Any]]
    last_closed: str | None


@dataclass(frozen=True)
class Known:
    """Usage of a close: USAGE_SCHEMA and, for `unique` meters, MEMBER_SCHEMA."""

    usage: pl.DataFrame
    members: pl.DataFrame


@dataclass(frozen=True)
class HourlyUsage:
    """Which hours are asked for; None means any. `after` is the last (hour, tenant, meter) seen."""

    tenant_id: str | None = None
    meter: str | None = None
    from_us: int | None = None
    to_us: int | None = None
    after: tuple[int, str, str] | None = None


class UsageStore:
    """Hourly buckets. Writes are part of the caller's transaction."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    @staticmethod
    async def before(transaction: AsyncConnection, group: str, partition: int) -> Before:
        """What is committed so far of a worker's partition."""
        last = sa.select(sa.func.max(closed_months.c.period)).scalar_subquery()
        row = (
            await transaction.execute(
                sa.select(checkpoints.c.progress, last)
                .where(checkpoints.c.group_name == group)
                .where(checkpoints.c.partition == partition)
            )
        ).one_or_none()
        if row is None:
            return Before((), None)
        progress, last_closed = row
        promises = Checkpoint.parse(progress, None, None).promises if progress else ()
        return Before(promises, last_closed)

    @staticmethod
    async def add(transaction: AsyncConnection, usage: pl.DataFrame, members: pl.DataFrame) -> None:
        """Merge usage (USAGE_SCHEMA, due_period, usage_period; a bucket at most once) and members
        (MEMBER_SCHEMA, partition, due_period, usage_period)."""
        if usage.height:
            await transaction.execute(_ADD_USAGE, arrays(usage))
        if members.height:
            await transaction.execute(_ADD_MEMBERS, arrays(members))

    @staticmethod
    async def meet(transaction: AsyncConnection, plans: Mapping[str, str]) -> set[str]:
        """Note tenants with their plans; returns those that were not known."""
        names = sorted(plans)
        values = {"tenants": names, "plans": [plans[name] for name in names]}
        return set((await transaction.execute(_MEET, values)).scalars())

    @staticmethod
    async def due_months(transaction: AsyncConnection) -> list[str]:
        """Every month whose invoice has usage of its own, closed or not; oldest first."""
        return list((await transaction.execute(_DUE_MONTHS)).scalars())

    @staticmethod
    async def known_at(transaction: AsyncConnection, period: str) -> Known:
        """All usage, known when `period` closes, of the tenants' months that something came for."""
        values = {"period": period}
        usage = await _columns(transaction, usage_buckets, USAGE_SCHEMA, values)
        members = await _columns(transaction, usage_members, MEMBER_SCHEMA, values)
        return Known(usage, members)

    async def hourly(self, wanted: HourlyUsage, limit: int) -> list[dict[str, Any]]:
        """Usage by hour, oldest first. Raises Retryable."""
        after_us, after_tenant, after_meter = wanted.after or (None, None, None)
        values = {
            "tenant": wanted.tenant_id,
            "meter": wanted.meter,
            "from_us": wanted.from_us,
            "to_us": wanted.to_us,
            "after_us": after_us,
            "after_tenant": after_tenant,
            "after_meter": after_meter,
            "limit": limit,
        }
        async with database_errors(), self._engine.connect() as connection:
            found = await connection.execute(_HOURLY, values)
            return [dict(row) for row in found.mappings()]

    @staticmethod
    async def change_plans(
        transaction: AsyncConnection, plan_of: Callable[[str], str]
    ) -> dict[str, int]:
        """Note the present plans of known tenants; returns the new sequence where one changed."""
        query = sa.select(tenants).order_by(tenants.c.tenant_id).with_for_update()
        found = (await transaction.execute(query)).all()
        changed = {row.tenant_id: row.sequence + 1 for row in found if plan_of(row[0]) != row.plan}
        for tenant, sequence in changed.items():
            update = sa.update(tenants).where(tenants.c.tenant_id == tenant)
            await transaction.execute(update.values(plan=plan_of(tenant), sequence=sequence))
        return changed


async def _columns(
    transaction: AsyncConnection, table: sa.Table, shape: pl.Schema, values: Mapping[str, str]
) -> pl.DataFrame:
    """Rows as one row of arrays: far cheaper to read than a row a bucket."""
    dialect = postgresql.dialect()  # type: ignore[no-untyped-call]
    columns = ", ".join(
        f"coalesce(array_agg(known.{name}),"
        f" CAST(ARRAY[] AS {table.c[name].type.compile(dialect)}[]))"
        for name in shape.names()
    )
    query = sa.text(
        f"""
        WITH touched AS (
            SELECT DISTINCT tenant_id, usage_period FROM usage_buckets WHERE due_period = :period
        )
        SELECT {columns} FROM {table.name} AS known JOIN touched USING (tenant_id, usage_period)
        WHERE known.due_period <= :period
        """
    )
    arrays_found = (await transaction.execute(query, values)).one()
    return pl.DataFrame(dict(zip(shape.names(), arrays_found, strict=True)), schema=shape)


def arrays(frame: pl.DataFrame) -> dict[str, list[Any]]:
    """The columns of a frame as SQL parameters for unnest."""
    return frame.to_dict(as_series=False)
