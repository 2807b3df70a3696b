"""What the lake holds of an event topic, read in columns. Needs the extra `lake`."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property

import polars as pl
from pyiceberg.manifest import DataFile
from pyiceberg.table import Table

from causemesh.catalogue import Topic
from causemesh.lake.opening import away
from causemesh.lake.progress import TableProgress, progress_of
from causemesh.lake.reading import Lake, Selection
from causemesh.lake.tables import load
from causemesh.lake.upkeep import horizon
from services.features.plan import LAKE_PLACE, lake_frame

_DAY_US = 86_400_000_000
_ROWS = 500_000  # read at once, or the rows of one day
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class LakePast:
    """The rows of a topic as they are in the lake now, and how far they are the topic."""

    topic: Topic
    table: Table
    retention_days: int

    @cached_property
    def progress(self) -> TableProgress:
        """Up to which positions the table holds the topic."""
        return progress_of(self.table.metadata)

    @cached_property
    def _files(self) -> list[DataFile]:
        with away():
            return [task.file for task in self.table.scan().plan_files()]

    @cached_property
    def reliable_us(self) -> int | None:
        """The event time since which the table has rows and retention took none out; None when it
        has no rows."""
        if not self._files:
            return None
        first = horizon(self._files, self.progress, self.retention_days)
        number = self.table.schema().find_field("occurred_at").field_id
        return max(first * _DAY_US, min(_earliest_us(one, number) for one in self._files))

    def rows(self, from_us: int | None) -> int:
        """About how many rows `frames` gives."""
        first = None if from_us is None else from_us // _DAY_US
        return sum(one.record_count for one in self._files if first is None or _day(one) >= first)

    def position(self, partition: int) -> int:
        """The last position of a partition that the table holds."""
        return self.progress.of(partition).position

    def marks(self, partitions: Collection[int]) -> list[list[object]]:
        """The marks that belong to those positions, as HighWaterMarks loads them."""
        return [
            [self.topic.name, number, *row]
            for number in partitions
            for row in self.progress.of(number).marks
        ]

    def frames(self, columns: Collection[str], from_us: int | None) -> Iterator[pl.DataFrame]:
        """The rows since `from_us` as the engine reads events, in no order."""
        there = {field.name for field in self.table.schema().fields}
        names = (*sorted(there.intersection(columns)), *LAKE_PLACE)
        now = self.table.current_snapshot()
        for first, last in self._stretches(from_us):
            since_us = first * _DAY_US if from_us is None else max(first * _DAY_US, from_us)
            bounds = _instant(since_us), _instant((last + 1) * _DAY_US)
            with away():
                assert now is not None, "there are files"
                chosen = Selection(self.table, now.snapshot_id, None, *bounds, names)
                rows = chosen.lazy().collect()
            yield lake_frame(self.topic, rows, columns)

    def _stretches(self, from_us: int | None) -> Iterator[tuple[int, int]]:
        """First and last days of stretches that are read at once."""
        counts: dict[int, int] = {}
        for one in self._files:
            counts[_day(one)] = counts.get(_day(one), 0) + one.record_count
        days = sorted(day for day in counts if from_us is None or (day + 1) * _DAY_US > from_us)
        first, rows = None, 0
        for day in days:
            first, rows = day if first is None else first, rows + counts[day]
            if rows >= _ROWS or day == days[-1]:
                yield first, day
                first, rows = None, 0


def _instant(at_us: int) -> datetime | None:
    """None beyond the year 9999, where no row can be."""
    try:
        return _EPOCH + timedelta(microseconds=at_us)
    except OverflowError:
        return None


def _day(file: DataFile) -> int:
    return int(file.partition[1])


def _earliest_us(file: DataFile, number: int) -> int:
    """The least event time of a file, by its statistics of the column of that number."""
    told = (file.lower_bounds or {}).get(number)
    if told is None:
        return _day(file) * _DAY_US
    return int.from_bytes(told, "little", signed=True)


def past_in(lake: Lake, topic: Topic) -> LakePast | None:
    """The topic's rows; None when the lake has no table of it. Raises Retryable."""
    for definition in lake.definition.of_topic(topic.name):
        if definition.zone == "decoded":
            with away():
                table = load(lake.catalog, definition.identifier)
            if table is not None:
                return LakePast(topic, table, definition.retention_days)
    return None
