"""The fenced commit: one Iceberg snapshot that holds the effect and its progress.

Iceberg commits are optimistic: a commit that was prepared on a snapshot that is no longer the
newest fails. So what is decided by looking at the newest snapshot, the epoch above all, holds at
the moment of the commit, and everyone who lost a race looks again.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pyiceberg.catalog import Catalog
from pyiceberg.exceptions import CommitFailedException
from pyiceberg.manifest import DataFile
from pyiceberg.table import Table

from causemesh.errors import Fatal, Retryable
from causemesh.lake.opening import away
from causemesh.lake.progress import TableProgress, progress_of
from causemesh.lake.tables import NO_RETRIES

_ATTEMPTS = 20
_WAIT_S = 0.02
_LONGEST_S = 1.0


@dataclass(frozen=True)
class Change:
    """What one snapshot does: the progress after it, files it adds and files it takes out."""

    progress: TableProgress
    add: Sequence[DataFile] = field(default_factory=tuple)
    remove: Sequence[DataFile] = field(default_factory=tuple)


Decide = Callable[[Table, TableProgress], Change | None]
"""From the table as it is now and its progress to the change; None for none. May raise Fenced."""


def commit(catalog: Catalog, identifier: str, decide: Decide) -> Table:
    """Commit what `decide` says about the newest snapshot; asked again whenever a race is lost.

    Raises what `decide` raises, Retryable when the catalog or the files are away, or the race was
    lost too often. After Retryable the change may have been made: `decide` sees its progress then.
    """
    for attempt in range(_ATTEMPTS):
        if attempt:
            longest = min(_WAIT_S * 2**attempt, _LONGEST_S)
            time.sleep(random.uniform(0, longest))
        with away():
            table = catalog.load_table(identifier)
            _check(table)
            change = decide(table, progress_of(table.metadata))
            if change is None:
                return table
            try:
                _snapshot(table, change)
            except CommitFailedException:
                continue
            return table
    raise Retryable(f"{identifier}: other commits came first {_ATTEMPTS} times", retry_after=1.0)


def _snapshot(table: Table, change: Change) -> None:
    transaction = table.transaction()
    update = transaction.update_snapshot(snapshot_properties=change.progress.summary())
    with update.overwrite() if change.remove else update.fast_append() as producer:
        for gone in change.remove:
            producer.delete_data_file(gone)
        for come in change.add:
            producer.append_data_file(come)
    transaction.commit_transaction()


def _check(table: Table) -> None:
    if table.metadata.properties.get(NO_RETRIES) != "0":
        raise Fatal(
            f"{'.'.join(table.name())}: {NO_RETRIES} must be 0; with repeated commits a replaced"
            " writer would not be fenced"
        )
