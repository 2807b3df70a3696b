"""Metered usage records a second: billing beside plain ways of putting the same records away.

usage: python -m benchmarks.usage_vs_postgres [--rounds 5] [--records 1000000]

Billing reads the records from Kafka, decodes them, drops replays, meters them into hourly buckets
with their position ranges, and commits buckets and position in one transaction. The bounds do less:
they put records that are in memory already, one row a record, into a table of the same Postgres.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import asyncpg
import polars as pl

from benchmarks.harness import Arm, Figures, rated, rounds, run_command, save, show, table, versions
from benchmarks.readings import READINGS, Filled, Place, frames, place
from causemesh.local.artefacts import KAFKA

_HOME = Path(".causemesh-bench-usage")
_UNIT = 10_000  # records a transaction, as billing takes them at most
_SENSORS = 10_000
_TABLE = """
    CREATE TABLE usage_records (
        event_id text NOT NULL, tenant_id text NOT NULL, meter text NOT NULL,
        occurred_at timestamptz NOT NULL, position bigint NOT NULL, quantity bigint NOT NULL
    )
"""
_COLUMNS = ("event_id", "tenant_id", "meter", "occurred_at", "position", "quantity")
_INSERT = "INSERT INTO usage_records VALUES ($1, $2, $3, $4, $5, $6)"
Put = Callable[[Any, list[tuple[Any, ...]]], Awaitable[None]]


def metered(where: Place, filled: Filled) -> Figures:
    """The billing service as it ships, from an empty database."""
    asyncio.run(where.fresh_database("billing"))
    argv = [sys.executable, "-m", "benchmarks.service_run", "billing", "--group", "billing"]
    more = ["--records", str(filled.in_log), "--warm", str(filled.count // 6)]
    figures = run_command([*argv, *more], where.environment())
    ((metered_micro, last),) = asyncio.run(
        where.sql("billing", "SELECT sum(quantity_micro), max(last) FROM usage_buckets")
    )
    if (metered_micro, last) != (filled.count * 1_000_000, filled.in_log - 2):
        raise RuntimeError(f"metered {metered_micro} up to {last}, of {filled.count} readings")
    return rated(figures)


def put_away(where: Place, count: int, put: Put) -> Figures:
    """Put records into a table, `_UNIT` a transaction."""
    return rated(asyncio.run(_put_away(where, count, put)))


async def _put_away(where: Place, count: int, put: Put) -> Figures:
    url = where.endpoints.database("postgres").replace("+asyncpg", "")
    connection = await asyncpg.connect(url)
    units = list(_rows(count))
    try:
        await connection.execute("DROP TABLE IF EXISTS usage_records")
        await connection.execute(_TABLE)
        began, cpu = time.perf_counter(), time.process_time()
        for unit in units:
            async with connection.transaction():
                await put(connection, unit)
        took, spent = time.perf_counter() - began, time.process_time() - cpu
        held = await connection.fetchval("SELECT count(*) FROM usage_records")
    finally:
        await connection.close()
    if held != count:
        raise RuntimeError(f"the table holds {held} of {count} records")
    return {"records": count, "seconds": took, "cpu_seconds": spent}


def _rows(count: int) -> list[list[tuple[Any, ...]]]:
    """The topic's records as rows of the table."""
    whole = pl.concat(frames(count, _SENSORS)).select(
        "event_id",
        "tenant_id",
        pl.lit("readings").alias("meter"),
        "occurred_at",
        pl.col("cause").struct.field("position"),
        pl.lit(1).alias("quantity"),
    )
    return [part.rows() for part in whole.iter_slices(_UNIT)]


async def _insert(connection: Any, rows: list[tuple[Any, ...]]) -> None:
    statement = await connection.prepare(_INSERT)
    for row in rows:
        await statement.fetch(*row)


async def _copy(connection: Any, rows: list[tuple[Any, ...]]) -> None:
    await connection.copy_records_to_table("usage_records", records=rows, columns=_COLUMNS)


def arms(where: Place, filled: Filled) -> list[Arm]:
    """Billing and the two bounds."""
    few = filled.count // 50
    unit = f"{_UNIT:,} records a transaction"
    return [
        Arm("causemesh billing", partial(metered, where, filled), {"unit": f"at most {unit}"}),
        Arm(
            "INSERT, a row at a time",
            partial(put_away, where, few, _insert),
            {"unit": unit, "records": few, "statement": "prepared; awaited one by one"},
        ),
        Arm("COPY", partial(put_away, where, filled.count, _copy), {"unit": unit}),
    ]


def main() -> None:
    """Fill a topic, run the rounds, write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--only", help="arms whose name contains this; nothing is written")
    told = parser.parse_args()
    with place(_HOME) as where:
        filled = asyncio.run(where.fill(told.records, _SENSORS))
        ((version,),) = asyncio.run(where.sql("postgres", "SHOW server_version"))
        chosen = [arm for arm in arms(where, filled) if (told.only or "") in arm.name]
        found = rounds(chosen, told.rounds)
    show(chosen, found)
    if told.only is None:
        of = {**versions("polars", "aiokafka", "asyncpg"), "postgres": version, "kafka": KAFKA}
        about = {"records": told.records, "topic": READINGS, "rounds": told.rounds}
        save("usage", {"arms": table(chosen, found)}, about=about, of=of)


if __name__ == "__main__":
    main()
