"""What a group's checkpoints in Postgres say about event time."""

from __future__ import annotations

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from causemesh.positions import Checkpoint
from causemesh.positions_sql import SqlPositionStore

pytestmark = pytest.mark.servers
INBOX = "inbox.t"


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
