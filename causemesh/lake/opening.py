"""Opening the catalog. Call `require_libraries` before importing this: it needs the extra."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa
from pyiceberg.catalog.sql import SqlCatalog

from causemesh.errors import Retryable
from causemesh.lake.settings import LakeSettings

_NAME = "causemesh"
_IDLE_S = 10


def open_catalog(settings: LakeSettings) -> SqlCatalog:
    """The Iceberg catalog; its tables are made when they are missing.

    Raises Misdeclared when a setting is missing, Retryable when the database is away.
    """
    settings.checked()
    with away():
        catalog = SqlCatalog(
            _NAME,
            **{
                "uri": settings.catalog,
                "warehouse": settings.warehouse,
                "pool_pre_ping": "true",
                # sweeping orphans lists files, which this FileIO alone can
                "py-io-impl": "pyiceberg.io.pyarrow.PyArrowFileIO",
                **settings.properties,
            },
        )
        if catalog.engine.dialect.name == "postgresql":
            sa.event.listen(catalog.engine, "connect", _limit)
            catalog.engine.dispose()  # the connection that made the tables
    return catalog


def _limit(connection: Any, _record: object) -> None:
    """A writer that is frozen in a commit keeps its table's row no longer than this."""
    cursor = connection.cursor()
    cursor.execute(f"SET idle_in_transaction_session_timeout = '{_IDLE_S}s'")
    cursor.close()
    connection.commit()


@contextmanager
def away() -> Iterator[None]:
    """A database or a file store that does not answer is worth waiting for: raises Retryable."""
    try:
        yield
    except (sa.exc.InterfaceError, sa.exc.OperationalError) as error:
        raise Retryable(f"the lake's catalog is away: {error.orig!r}", retry_after=1.0) from error
    except OSError as error:  # pyarrow raises it for every file system
        raise Retryable(f"the lake's files are away: {error!r}", retry_after=1.0) from error
