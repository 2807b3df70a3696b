"""What every service's database shares: the kit's tables and how database errors are read."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import sqlalchemy as sa

from causemesh.errors import Retryable

metadata = sa.MetaData()
"""The kit's own tables; a service's tables have a MetaData of their own."""


# Connection failures, no resources left, shutting down, starting up. Drivers do not always
# tell these apart from mistakes by the class of their error.
_AWAY_STATES = ("08", "53", "57P")


def _is_away(error: sa.exc.DBAPIError) -> bool:
    state = getattr(error.orig, "sqlstate", None) or ""
    return (
        error.connection_invalidated
        or isinstance(error, sa.exc.OperationalError)
        or state.startswith(_AWAY_STATES)
    )


@asynccontextmanager
async def database_errors() -> AsyncIterator[None]:
    """A lost connection or a restarting server is worth waiting for; other errors are bugs."""
    try:
        yield
    except sa.exc.DBAPIError as error:
        if _is_away(error):
            raise Retryable(f"the database is away: {error.orig!r}", retry_after=1.0) from error
        raise
    except (ConnectionError, TimeoutError) as error:
        raise Retryable(f"the database is away: {error!r}", retry_after=1.0) from error
