"""Which database errors are worth waiting for."""

from __future__ import annotations

import asyncpg
import pytest
import sqlalchemy as sa

from causemesh.errors import Retryable
from causemesh.sql import database_errors


class _Answer(Exception):
    """What a driver raises, with Postgres' code of it."""

    def __init__(self, sqlstate: str) -> None:
        super().__init__(sqlstate)
        self.sqlstate = sqlstate


async def _answered(sqlstate: str) -> None:
    async with database_errors():
        raise sa.exc.DBAPIError("SELECT 1", None, _Answer(sqlstate))


@pytest.mark.parametrize(
    "sqlstate",
    [
        "57P03",  # starting up, as after a crash
        "57P01",  # shut down by an administrator
        "57P02",  # shut down by a crash
        "08006",  # connection failure
        "53300",  # too many connections
    ],
)
async def test_a_server_that_can_not_serve_now_is_waited_for(sqlstate: str) -> None:
    with pytest.raises(Retryable):
        await _answered(sqlstate)


@pytest.mark.parametrize(
    "error",
    [
        asyncpg.exceptions.CannotConnectNowError("starting up"),
        asyncpg.exceptions.AdminShutdownError("shut down"),
        asyncpg.exceptions.ConnectionDoesNotExistError("closed in the middle of an operation"),
        asyncpg.exceptions.InterfaceError("the connection is closed"),
        ConnectionResetError(),
    ],
)
async def test_the_driver_itself_says_so_in_its_own_words(error: Exception) -> None:
    with pytest.raises(Retryable):
        async with database_errors():
            raise error


async def test_the_driver_s_other_errors_are_bugs() -> None:
    with pytest.raises(asyncpg.UniqueViolationError):
        async with database_errors():
            raise asyncpg.UniqueViolationError("twice")


@pytest.mark.parametrize("sqlstate", ["23505", "42P01", "57014"])
async def test_other_answers_are_bugs(sqlstate: str) -> None:
    """A unique key, a table that is not there, a cancelled statement."""
    with pytest.raises(sa.exc.DBAPIError):
        await _answered(sqlstate)
