"""Checkpoints in Postgres: the position commits in the transaction that holds the effect."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncEngine

from causemesh.errors import Fenced
from causemesh.positions import Checkpoint, Claim, Unit
from causemesh.sql import LazyTransaction, SingleStatements, database_errors, metadata

checkpoints = sa.Table(
    "checkpoints",
    metadata,
    sa.Column("group_name", sa.Text, primary_key=True),
    sa.Column("partition", sa.Integer, primary_key=True),
    sa.Column("epoch", sa.BigInteger, nullable=False),
    sa.Column("progress", sa.Text),
    sa.Column("watermark_us", sa.BigInteger),
    sa.Column("state", sa.LargeBinary),
    sa.Column(
        "committed_at",
        sa.DateTime(timezone=True),
        server_default=sa.func.now(),
        onupdate=sa.func.now(),
        nullable=False,
    ),
)
"""One row a group and partition; every service's own database has this table."""

_COMMIT = """
    UPDATE checkpoints
    SET progress = $4, watermark_us = $5, state = $6, committed_at = now()
    WHERE group_name = $1 AND partition = $2 AND epoch = $3
"""


class SqlPositionStore:
    """See `PositionStore`; a unit's `transaction` is a LazyTransaction."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._single = SingleStatements(engine)

    async def claim(self, group: str, partition: int) -> tuple[Claim, Checkpoint | None]:
        """See `PositionStore.claim`."""
        table = checkpoints
        statement = (
            insert(table)
            .values(group_name=group, partition=partition, epoch=1)
            .on_conflict_do_update(
                index_elements=["group_name", "partition"], set_={"epoch": table.c.epoch + 1}
            )
            .returning(table.c.epoch, table.c.progress, table.c.watermark_us, table.c.state)
        )
        async with database_errors(), self._engine.begin() as connection:
            row = (await connection.execute(statement)).one()
        claim = Claim(group, partition, row.epoch)
        if row.progress is None:
            return claim, None
        return claim, Checkpoint.parse(row.progress, row.watermark_us, row.state)

    def unit(self, claim: Claim) -> AbstractAsyncContextManager[Unit]:
        """See `PositionStore.unit`."""
        return self._unit(claim)

    @asynccontextmanager
    async def _unit(self, claim: Claim) -> AsyncIterator[Unit]:
        async with database_errors(), AsyncExitStack() as stack:
            yield _SqlUnit(LazyTransaction(self._engine, self._single, stack), claim)

    async def watermark(self, group: str, partitions: int) -> int | None:
        """The least committed watermark of a group, microseconds; None until all have one."""
        table = checkpoints
        statement = sa.select(
            sa.func.count(table.c.watermark_us), sa.func.min(table.c.watermark_us)
        )
        async with database_errors(), self._engine.connect() as connection:
            row = (await connection.execute(statement.where(table.c.group_name == group))).one()
        return int(row[1]) if row[0] == partitions else None

    async def promised(self, group: str, inbox: str, partitions: int) -> int | None:
        """The least watermark that an inbox topic's producers promised, microseconds; None until
        all its partitions have one."""
        table = checkpoints
        statement = sa.select(table.c.progress).where(table.c.group_name == group)
        async with database_errors(), self._engine.connect() as connection:
            stored = (await connection.execute(statement)).scalars().all()
        promises = [
            at_us
            for progress in stored
            if progress is not None
            for topic, _, origin, _, at_us in Checkpoint.parse(progress, None, None).promises
            if topic == origin == inbox
        ]
        return min(promises) if len(promises) == partitions else None


class _SqlUnit:
    def __init__(self, transaction: LazyTransaction, claim: Claim) -> None:
        self.transaction = transaction
        self._claim = claim

    async def commit(self, checkpoint: Checkpoint) -> None:
        claim = self._claim
        if await self._written(checkpoint) != 1:
            raise Fenced(f"{claim.group}[{claim.partition}]: epoch {claim.epoch} was replaced")
        await self.transaction.commit()

    async def _written(self, checkpoint: Checkpoint) -> int:
        """Write the checkpoint if the epoch is ours, in the unit's transaction if it has one;
        returns how many rows that were."""
        claim, table = self._claim, checkpoints
        progress, watermark_us = checkpoint.progress(), checkpoint.watermark_us
        if not self.transaction.begun:  # no effects: the statement is the whole transaction
            key = (claim.group, claim.partition, claim.epoch)
            return await self.transaction.single.execute(
                _COMMIT, *key, progress, watermark_us, checkpoint.state
            )
        update = (
            sa.update(table)
            .where(table.c.group_name == claim.group)
            .where(table.c.partition == claim.partition)
            .where(table.c.epoch == claim.epoch)
            .values(progress=progress, watermark_us=watermark_us, state=checkpoint.state)
        )
        return (await self.transaction.execute(update)).rowcount
