"""What every service's database shares: the kit's tables and how database errors are read."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import sqlalchemy as sa

from causemesh.errors import Retryable

metadata = sa.MetaData()
"""The kit's own tables; a service's tables have a MetaData of their own."""


@asynccontextmanager
async def database_errors() -> AsyncIterator[None]:
    """A lost connection or a restarting server is worth waiting for; other errors are bugs."""
    try:
        yield
    except sa.exc.DBAPIError as error:
        if error.connection_invalidated or isinstance(error, sa.exc.OperationalError):
            raise Retryable(f"the database is away: {error.orig!r}", retry_after=1.0) from error
        raise
    except (ConnectionError, TimeoutError) as error:
        raise Retryable(f"the database is away: {error!r}", retry_after=1.0) from error
