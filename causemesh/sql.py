"""What every service's database shares: the kit's tables and how database errors are read."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import asyncpg
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from causemesh.errors import Retryable

metadata = sa.MetaData()
"""The kit's own tables; a service's tables have a MetaData of their own."""


# Connection failures, no resources left, shutting down, starting up. Drivers do not always
# tell these apart from mistakes by the class of their error.
_AWAY_STATES = ("08", "53", "57P")


def _is_away(error: sa.exc.DBAPIError) -> bool:
    return (
        error.connection_invalidated
        or isinstance(error, sa.exc.OperationalError)
        or _says_away(error.orig)
    )


def _says_away(error: object) -> bool:
    state = getattr(error, "sqlstate", None) or ""
    return bool(state.startswith(_AWAY_STATES))


@asynccontextmanager
async def database_errors() -> AsyncIterator[None]:
    """A lost connection or a restarting server is worth waiting for; other errors are bugs."""
    try:
        yield
    except sa.exc.DBAPIError as error:
        if _is_away(error):
            raise Retryable(f"the database is away: {error.orig!r}", retry_after=1.0) from error
        raise
    except asyncpg.PostgresError as error:
        if _says_away(error):
            raise Retryable(f"the database is away: {error!r}", retry_after=1.0) from error
        raise
    # InternalClientError: the server ended the connection while the driver was about to use it.
    except (
        ConnectionError,
        TimeoutError,
        asyncpg.InterfaceError,
        asyncpg.InternalClientError,
    ) as error:
        raise Retryable(f"the database is away: {error!r}", retry_after=1.0) from error


class SingleStatements:
    """Statements that are a transaction each, by the driver: a quarter of the processor time that
    a statement takes through SQLAlchemy, and one way to the server instead of three."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine.execution_options(isolation_level="AUTOCOMMIT")

    async def execute(self, statement: str, *values: Any) -> int:
        """Execute in Postgres' own form ($1, $2, ...); returns the number of rows it touched.

        Raises Retryable.
        """
        async with self._driver() as driver:
            told: str = await driver.execute(statement, *values)
        return int(told.rsplit(" ", 1)[1])

    async def rows(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        """The rows of a query in Postgres' own form. Raises Retryable."""
        async with self._driver() as driver:
            return [tuple(row) for row in await driver.fetch(statement, *values)]

    @asynccontextmanager
    async def _driver(self) -> AsyncIterator[Any]:
        async with database_errors(), self._engine.connect() as connection:
            raw = await connection.get_raw_connection()
            try:
                yield raw.driver_connection
            except BaseException:
                # The pool did not see it happen: whatever it was, the next user gets a new one.
                await connection.invalidate()
                raise


class LazyTransaction:
    """A transaction that begins, on a connection of its own, with its first statement.

    Most units of work of a service that writes no SQL end without any.
    """

    def __init__(
        self, engine: AsyncEngine, single: SingleStatements, stack: AsyncExitStack
    ) -> None:
        self.single = single
        """For what is a transaction of its own."""
        self._engine = engine
        self._stack = stack
        self._connection: AsyncConnection | None = None

    @property
    def begun(self) -> bool:
        """Whether there was a statement."""
        return self._connection is not None

    async def execute(self, statement: sa.Executable, values: Any = None) -> sa.CursorResult[Any]:
        """See `AsyncConnection.execute`."""
        if self._connection is None:
            self._connection = await self._stack.enter_async_context(self._engine.connect())
        return await self._connection.execute(statement, values)

    async def commit(self) -> None:
        """Commit what was executed."""
        if self._connection is not None:
            await self._connection.commit()
