"""Transactions of an owner that is silent end; those of long work are given the time they need."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine

from causemesh.errors import Retryable
from causemesh.sql import database_errors, idle_for, open_engine

pytestmark = pytest.mark.servers
LIMIT_S = 0.5
ONE = sa.text("SELECT 1")


@pytest.fixture
async def limited(database: AsyncEngine) -> AsyncIterator[AsyncEngine]:
    url = database.url.render_as_string(hide_password=False)
    engine = open_engine(url, "idler", round(LIMIT_S * 1000))
    yield engine
    await engine.dispose()


async def idle(engine: AsyncEngine, *limits: float | None) -> None:
    """Be idle in a transaction twice as long as a unit of work may, then go on in it."""
    async with database_errors(), engine.begin() as transaction:
        await transaction.execute(ONE)
        for limit_s in limits:
            await idle_for(transaction, limit_s)
        await asyncio.sleep(2 * LIMIT_S)
        await transaction.execute(ONE)


async def test_an_idle_transaction_ends_and_the_unit_is_tried_again(limited: AsyncEngine) -> None:
    with pytest.raises(Retryable):
        await idle(limited)
    with pytest.raises(Retryable):
        await idle(limited, 0.6 * LIMIT_S)


@pytest.mark.parametrize("limit_s", [None, 10.0])
async def test_long_work_may_be_idle(limited: AsyncEngine, limit_s: float | None) -> None:
    await idle(limited, limit_s)
    with pytest.raises(Retryable):  # for that one transaction alone
        await idle(limited)


async def test_sessions_tell_whose_they_are(limited: AsyncEngine) -> None:
    async with limited.connect() as connection:
        name = await connection.execute(sa.text("SHOW application_name"))
        assert name.scalar_one() == "idler"
