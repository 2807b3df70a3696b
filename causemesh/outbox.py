"""The outbox: effects and the events about them commit together; a drain sends them in order.

A service that writes SQL *and* emits adds its events as rows in the same transaction. Rows of one
shard are numbered by locking the shard's head, so numbers rise in commit order without gaps in what
a reader sees, and the row number can be the cause position: cause topic `outbox.<service>`, cause
partition the shard. A crash between send and the mark "drained" sends rows again under the same
causes; their readers drop them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import sqlalchemy as sa
import structlog
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from causemesh.catalogue import Catalogue, Schema
from causemesh.clock import SystemClock
from causemesh.codec.columns import column_type
from causemesh.errors import Misdeclared
from causemesh.faultpoints import Point, reach
from causemesh.periodic import repeat
from causemesh.runner.batch import Outgoing
from causemesh.runner.emitter import Emitter
from causemesh.spans import context_of
from causemesh.spans_sending import OutboxSpans
from causemesh.sql import database_errors, metadata

_log = structlog.get_logger(__name__)
_DRAIN_ROWS = 1_000
_POLL_S = 0.5
_DERIVED = frozenset(["event_id", "cause"])

outbox_heads = sa.Table(
    "outbox_heads",
    metadata,
    sa.Column("shard", sa.Integer, primary_key=True),
    sa.Column("head", sa.BigInteger, nullable=False),
)
outbox_drains = sa.Table(
    "outbox_drains",
    metadata,
    sa.Column("shard", sa.Integer, primary_key=True),
    sa.Column("drained", sa.BigInteger, nullable=False),
)
outbox_rows = sa.Table(
    "outbox_rows",
    metadata,
    sa.Column("shard", sa.Integer, primary_key=True),
    sa.Column("row_number", sa.BigInteger, primary_key=True),
    sa.Column("topic", sa.Text, nullable=False),
    sa.Column("key", sa.Text),
    sa.Column("record", sa.Text, nullable=False),
    sa.Column("origin_topic", sa.Text),
    sa.Column("origin_partition", sa.Integer),
    sa.Column("origin_position", sa.BigInteger),
    sa.Column("traceparent", sa.Text),
    sa.Column("added_at", sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False),
)

# An index step a shard: most looks find nothing, and must cost no more than this statement.
_WAITING = (
    sa.select(outbox_drains.c.shard)
    .where(
        sa.exists().where(
            outbox_rows.c.shard == outbox_drains.c.shard,
            outbox_rows.c.row_number > outbox_drains.c.drained,
        )
    )
    .order_by(outbox_drains.c.shard)
)


@dataclass(frozen=True)
class Event:
    """One event to send.

    `record` holds the topic's fields but event_id and cause; instants as integers (microseconds).
    `origin` is the topic record (topic, partition, position) that led to it; None for the API.
    `traceparent` is the W3C trace context it goes on with; that of its origin, where the unit in
    progress traces it, unless given.
    """

    topic: str
    key: str | None
    record: Mapping[str, Any]
    origin: tuple[str, int, int] | None = None
    traceparent: bytes | None = None


async def add_events(
    connection: AsyncConnection, events: Sequence[Event], *, shard: int = 0
) -> None:
    """Add events to a shard inside the caller's transaction, in order."""
    if not events:
        return
    count = len(events)
    bump = (
        insert(outbox_heads)
        .values(shard=shard, head=count)
        .on_conflict_do_update(index_elements=["shard"], set_={"head": outbox_heads.c.head + count})
        .returning(outbox_heads.c.head)
    )
    head = int((await connection.execute(bump)).scalar_one())
    rows = [
        {
            "shard": shard,
            "row_number": head - count + number,
            "topic": event.topic,
            "key": event.key,
            "record": json.dumps(event.record, separators=(",", ":")),
            "origin_topic": event.origin and event.origin[0],
            "origin_partition": event.origin and event.origin[1],
            "origin_position": event.origin and event.origin[2],
            "traceparent": _text(event.traceparent or context_of(event.origin)),
        }
        for number, event in enumerate(events, 1)
    ]
    await connection.execute(sa.insert(outbox_rows), rows)
    drained = insert(outbox_drains).values(shard=shard, drained=0).on_conflict_do_nothing()
    await connection.execute(drained)


def _text(context: bytes | None) -> str | None:
    return None if context is None else context.decode("ascii", "replace")


class OutboxDrain:
    """Sends outbox rows in order; any number of processes may run one."""

    def __init__(
        self,
        service: str,
        engine: AsyncEngine,
        catalogue: Catalogue,
        emitter: Emitter,
        *,
        spans: OutboxSpans | None = None,
    ) -> None:
        self._cause_topic = f"outbox.{service}"
        self._engine = engine
        self._catalogue = catalogue
        self._emitter = emitter
        self._spans = spans or OutboxSpans(None, "")

    async def run(self) -> None:
        """Drain until cancelled; waits for a broker or database that is away."""
        await repeat("outbox", self.drain, SystemClock(), _POLL_S)

    async def drain(self) -> int:
        """Send what waits; returns how many rows. Raises Retryable."""
        async with database_errors(), self._engine.connect() as connection:
            shards = (await connection.execute(_WAITING)).scalars().all()
        return sum([await self._drain_shard(shard) for shard in shards])

    async def _drain_shard(self, shard: int) -> int:
        drains, rows = outbox_drains.c, outbox_rows.c
        async with database_errors(), self._engine.begin() as connection:
            # The row lock keeps other drains away, and ends with the connection that holds it.
            lock = sa.select(drains.drained).where(drains.shard == shard)
            lock = lock.with_for_update(skip_locked=True)
            drained = (await connection.execute(lock)).scalar_one_or_none()
            if drained is None:
                return 0
            waiting = (
                sa.select(outbox_rows)
                .where(rows.shard == shard, rows.row_number > drained)
                .order_by(rows.row_number)
                .limit(_DRAIN_ROWS)
            )
            found = (await connection.execute(waiting)).mappings().all()
            if not found:
                return 0
            reach(Point.OUTBOX_READ)
            with self._spans.sending(_traced(found)) as contexts:
                traces = {(self._cause_topic, shard): contexts} if contexts else None
                await self._emitter.send(self._outgoing(shard, found), {}, traces)
            reach(Point.OUTBOX_SENT)
            last = found[-1]["row_number"]
            await connection.execute(
                sa.update(outbox_drains).where(drains.shard == shard).values(drained=last)
            )
            await connection.execute(
                sa.delete(outbox_rows).where(rows.shard == shard, rows.row_number <= last)
            )
        reach(Point.OUTBOX_MARKED)
        return len(found)

    def _outgoing(self, shard: int, found: Sequence[Any]) -> list[Outgoing]:
        """One Outgoing a topic, rows in order."""
        by_topic: dict[str, list[Any]] = {}
        for row in found:
            by_topic.setdefault(row["topic"], []).append(row)
        return [self._of_topic(topic, shard, rows) for topic, rows in by_topic.items()]

    def _of_topic(self, topic: str, shard: int, rows: Sequence[Any]) -> Outgoing:
        record = self._catalogue.topic(topic).record
        frame = records_frame(record, [json.loads(row["record"]) for row in rows])
        origins = [
            None
            if row["origin_topic"] is None
            else {
                "topic": row["origin_topic"],
                "partition": row["origin_partition"],
                "position": row["origin_position"],
            }
            for row in rows
        ]
        shape = pl.Struct({"topic": pl.String, "partition": pl.Int32, "position": pl.Int64})
        return Outgoing(
            topic,
            frame,
            [None if row["key"] is None else row["key"].encode() for row in rows],
            self._cause_topic,
            shard,
            np.array([row["row_number"] for row in rows], dtype=np.int64),
            origins=pl.Series(origins, dtype=shape),
        )


def _traced(rows: Sequence[Any]) -> dict[int, tuple[str, bytes]]:
    """Topic and context of the rows that are traced."""
    return {
        row["row_number"]: (row["topic"], row["traceparent"].encode())
        for row in rows
        if row["traceparent"] is not None
    }


def records_frame(record: Schema, rows: Sequence[Mapping[str, Any]]) -> pl.DataFrame:
    """JSON records as the columns of a topic's record, less what the emitter derives.

    Instants come as integers (microseconds). Raises Misdeclared for bytes, which JSON can't hold.
    """
    columns = []
    for field in record["fields"]:
        name, kind = field["name"], column_type(field["type"])
        if name in _DERIVED:
            continue
        if kind == pl.Binary:
            raise Misdeclared(f"{record['name']}.{name}: bytes can't go through an outbox")
        values = [row.get(name, field.get("default")) for row in rows]
        columns.append(_column(name, values, kind))
    return pl.DataFrame(columns)


def _column(name: str, values: list[Any], kind: Any) -> pl.Series:
    if isinstance(kind, pl.Datetime):
        return pl.Series(name, values, dtype=pl.Int64).cast(kind)
    return pl.Series(name, values, dtype=kind, strict=True)
