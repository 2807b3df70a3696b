"""What every service's database shares: the kit's tables and how database errors are read."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import asyncpg
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from causemesh.errors import Retryable

metadata = sa.MetaData()
"""The kit's own tables; a service's tables have a MetaData of their own."""


# Connection failures, no resources left, shutting down, starting up, idle for too long. Drivers do
# not always tell these apart from mistakes by the class of their error.
_AWAY_STATES = ("08", "53", "57P", "25P03")
_IDLE = "idle_in_transaction_session_timeout"
_SET_IDLE = sa.text("SELECT set_config(:name, :value, true)")
# A host that is gone without a word: its connections end after 10 s + 3 * 5 s.
_KEEPALIVES = {"tcp_keepalives_idle": 10, "tcp_keepalives_interval": 5, "tcp_keepalives_count": 3}


def open_engine(
    url: str, name: str, session_timeout_ms: int, *, pool_size: int = 5, max_overflow: int = 10
) -> AsyncEngine:
    """An engine whose sessions are called `name`, and whose transactions don't outlive their owner.

    A process that is frozen, or whose host is gone, keeps the locks of its open transactions, and
    who takes over its partitions would wait for them. So the server ends a transaction that has
    been idle as long as the group waits for a silent member: see `idle_for`.
    """
    told = {"application_name": name, _IDLE: session_timeout_ms, **_KEEPALIVES}
    return create_async_engine(
        url,
        pool_size=pool_size,
        max_overflow=max_overflow,
        connect_args={"server_settings": {key: str(value) for key, value in told.items()}},
    )


async def idle_for(transaction: AsyncConnection, limit_s: float | None) -> None:
    """Let the transaction be idle longer than a unit of work may: None without end."""
    ms = 0 if limit_s is None else round(limit_s * 1000)
    await transaction.execute(_SET_IDLE, {"name": _IDLE, "value": str(ms)})


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
