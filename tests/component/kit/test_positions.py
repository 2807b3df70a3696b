"""What a group's checkpoints in Postgres say about event time."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from causemesh.errors import Fenced, Retryable
from causemesh.positions import Checkpoint, Unit
from causemesh.positions_sql import SqlPositionStore

pytestmark = pytest.mark.servers
INBOX = "inbox.t"
effects = sa.Table("effects", sa.MetaData(), sa.Column("name", sa.Text, nullable=False))


async def commit(
    store: SqlPositionStore,
    group: str,
    partition: int,
    watermark_us: int | None,
    promises: list[list[object]] | None = None,
) -> None:
    claim, _ = await store.claim(group, partition)
    async with store.unit(claim) as unit:
        await unit.commit(Checkpoint({(INBOX, partition): 1}, [], promises or [], watermark_us))


async def test_a_group_is_as_far_as_its_slowest_partition(database: AsyncEngine) -> None:
    store = SqlPositionStore(database)
    assert await store.watermark("g", 2) is None
    await commit(store, "g", 0, 50)
    assert await store.watermark("g", 2) is None  # the other partition has promised nothing
    await store.claim("g", 1)
    assert await store.watermark("g", 2) is None  # claimed is not yet promised
    await commit(store, "g", 1, None)
    assert await store.watermark("g", 2) is None
    await commit(store, "g", 1, 30)
    assert await store.watermark("g", 2) == 30
    await commit(store, "g", 1, 70)
    assert await store.watermark("g", 2) == 50


async def test_groups_do_not_mix(database: AsyncEngine) -> None:
    store = SqlPositionStore(database)
    await commit(store, "g", 0, 50)
    await commit(store, "other", 1, 10)
    assert await store.watermark("g", 1) == 50
    assert await store.watermark("g", 2) is None


async def test_before_the_epoch_is_a_watermark_too(database: AsyncEngine) -> None:
    store = SqlPositionStore(database)
    await commit(store, "g", 0, 0)
    await commit(store, "g", 1, -7)
    assert await store.watermark("g", 2) == -7


async def test_what_the_producers_of_one_inbox_promised(database: AsyncEngine) -> None:
    store = SqlPositionStore(database)
    assert await store.promised("g", INBOX, 2) is None
    other = ["inbox.other", 0, "inbox.other", 0, 5]
    forwarded = ["events.t", 0, INBOX, 0, 6]
    await commit(store, "g", 0, 1, [[INBOX, 0, INBOX, 0, 90], other, forwarded])
    await store.claim("g", 1)
    assert await store.promised("g", INBOX, 2) is None
    await commit(store, "g", 1, 1, [[INBOX, 1, INBOX, 1, 40]])
    assert await store.promised("g", INBOX, 2) == 40
    assert await store.promised("g", "inbox.other", 1) == 5
    assert await store.promised("g", "inbox.other", 2) is None
    assert await store.promised("h", INBOX, 2) is None


async def test_a_unit_that_is_left_without_a_commit_moves_nothing(database: AsyncEngine) -> None:
    store = SqlPositionStore(database)
    await commit(store, "g", 0, 50)
    claim, _ = await store.claim("g", 0)
    async with store.unit(claim):
        pass
    _, stored = await store.claim("g", 0)
    assert stored is not None
    assert (stored.watermark_us, stored.positions) == (50, {(INBOX, 0): 1})


async def commit_with(unit: Unit, effect: str | None, watermark_us: int) -> None:
    """Commit a unit, with an effect in its transaction or without any."""
    if effect is not None:
        await unit.transaction.execute(sa.insert(effects).values(name=effect))
    await unit.commit(Checkpoint({}, [], [], watermark_us))


@pytest.mark.parametrize("effect", [None, "made"])
async def test_a_replaced_claim_commits_nothing(database: AsyncEngine, effect: str | None) -> None:
    """Without effects a checkpoint is one statement by the driver; the fence holds there too."""
    store = SqlPositionStore(database)
    async with database.begin() as connection:
        await connection.run_sync(effects.metadata.create_all)
    old, _ = await store.claim("g", 0)
    new, _ = await store.claim("g", 0)
    with pytest.raises(Fenced):
        async with store.unit(old) as unit:
            await commit_with(unit, effect, 1)
    assert (await store.claim("other", 0))[1] is None
    async with store.unit(new) as unit:
        await commit_with(unit, effect, 2)
    _, stored = await store.claim("g", 0)
    assert stored is not None
    assert stored.watermark_us == 2
    async with database.connect() as connection:
        found = (await connection.execute(sa.select(effects.c.name))).scalars().all()
    assert found == ([] if effect is None else [effect])  # once: the old claim's is undone


async def test_a_unit_without_a_statement_takes_no_connection(database: AsyncEngine) -> None:
    store = SqlPositionStore(database)
    claim, _ = await store.claim("g", 0)
    pool: Any = database.pool
    before = pool.checkedout()
    async with store.unit(claim) as unit:
        assert pool.checkedout() == before
        await unit.transaction.execute(sa.text("SELECT 1"))
        assert pool.checkedout() == before + 1
    assert pool.checkedout() == before


async def test_a_lost_connection_is_waited_for_and_the_next_is_another(
    database: AsyncEngine,
) -> None:
    store = SqlPositionStore(database)
    claim, _ = await store.claim("g", 0)
    async with store.unit(claim) as unit:
        await unit.commit(Checkpoint({}, [], [], 1))
    others = (
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    killer = create_async_engine(database.url, isolation_level="AUTOCOMMIT")
    async with killer.connect() as connection:
        await connection.execute(sa.text(others))
    await killer.dispose()
    with pytest.raises(Retryable):
        async with store.unit(claim) as unit:
            await unit.commit(Checkpoint({}, [], [], 2))
    async with store.unit(claim) as unit:
        await unit.commit(Checkpoint({}, [], [], 3))
    assert await store.watermark("g", 1) == 3
