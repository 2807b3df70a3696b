"""The processor: batches of the log to rows of tables."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl
from polars.exceptions import PolarsError

from causemesh.catalogue import Catalogue
from causemesh.lake.definitions import LakeDefinition, TableDefinition
from causemesh.lake.rows import curated_rows, datable, decoded_rows, raw_rows
from causemesh.runner import Batch, Emission

Written = list[tuple[str, pl.DataFrame]]
"""Tables and rows for them: the transaction of a unit."""


class LakeWriter:
    """Turns every record into rows; what can't be a row of its table goes aside as it lay in the
    log, with the reason.

    It counts as stateful, since what waits for a snapshot is state: after an error a worker starts
    over from the tables. No row is ever left out, or a table would not equal its log.
    """

    takes_bad_rows = True
    stateful = True

    def __init__(self, catalogue: Catalogue, definition: LakeDefinition) -> None:
        self._catalogue = catalogue
        self._tables = {topic: definition.of_topic(topic) for topic in definition.topics}

    async def process(
        self, batches: Sequence[Batch], watermark_us: int, transaction: Any
    ) -> Emission:
        """See `Processor.process`; the rows are added to the unit's transaction."""
        for batch in batches:
            if self._catalogue.topic(batch.topic).form == "inbox":
                (table,) = self._tables[batch.topic]
                rows = raw_rows(batch.raw, batch.rows, batch.frame, batch.bad)
                transaction.append((table.identifier, rows))
            else:
                transaction.extend(self._decoded(batch))
            await asyncio.sleep(0)  # the loop keeps the group's heartbeats, too
        return Emission()

    def _decoded(self, batch: Batch) -> Written:
        reasons = dict(batch.bad)
        good = _datable(batch, reasons)
        decoded = decoded_rows(batch.raw, good.rows, good.frame)
        written: Written = []
        aside: TableDefinition | None = None
        for table in self._tables[batch.topic]:
            if table.aside:
                aside = table
            elif table.zone == "decoded":
                written.append((table.identifier, decoded))
            else:
                rows, wrong = _curated(table, decoded)
                written.append((table.identifier, rows))
                reasons |= {int(good.rows[row]): reason for row, reason in wrong.items()}
        if reasons and aside is not None:
            none = np.empty(0, dtype=np.int64)
            rows = raw_rows(batch.raw, none, good.frame.clear(), reasons)
            written.insert(0, (aside.identifier, rows))
        return [(name, rows) for name, rows in written if rows.height]

    def snapshot(self) -> bytes | None:
        """No state: what waits for a commit is the store's."""
        return None

    def restore(self, state: bytes | None) -> None:
        """No state."""


def _datable(batch: Batch, reasons: dict[int, str]) -> Batch:
    """The batch without the rows that hold an instant outside the years 1 to 9999, for which
    `reasons` (by raw row) get a reason."""
    wrong: set[int] = set()
    for column in batch.frame.iter_columns():
        if isinstance(column.dtype, pl.Datetime):
            outside = column.is_not_null() & ~datable(column)
            for row in outside.arg_true().to_list():
                wrong.add(row)
                reasons[int(batch.rows[row])] = f"{column.name} lies outside the years 1 to 9999"
    return batch.without(sorted(wrong)) if wrong else batch


def _curated(table: TableDefinition, decoded: pl.DataFrame) -> tuple[pl.DataFrame, dict[int, str]]:
    """Rows of a curated table, and why some rows of `decoded` (by number) gave none."""
    try:
        return curated_rows(table, decoded), {}
    except PolarsError as error:
        if decoded.height == 1:
            empty = curated_rows(table, decoded.clear())
            return empty, {0: f"{table.identifier}: {error}"[:500]}
    middle = decoded.height // 2
    first, wrong = _curated(table, decoded[:middle])
    second, more = _curated(table, decoded[middle:])
    return pl.concat([first, second]), wrong | {row + middle: why for row, why in more.items()}
