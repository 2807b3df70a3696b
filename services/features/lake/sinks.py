"""What waits for one table, and its commit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import polars as pl
from pyiceberg.catalog import Catalog
from pyiceberg.manifest import DataFile
from pyiceberg.table import Table

from causemesh.clock import Clock
from causemesh.faultpoints import Point, reach
from causemesh.lake.commits import Change, commit
from causemesh.lake.definitions import TableDefinition
from causemesh.lake.progress import PartitionProgress, TableProgress
from causemesh.lake.rows import filled
from causemesh.lake.tables import ensure, write


@dataclass
class Part:
    """What waits of one partition: rows behind position `after`, and the progress with them."""

    after: int
    progress: PartitionProgress
    frames: list[pl.DataFrame] = field(default_factory=list)


@dataclass(frozen=True)
class Refusal:
    """Rows that were written under `epoch` and are not in the table: a later claim has their
    partition (`replaced`), or they do not begin where the table ends."""

    epoch: int
    replaced: bool


@dataclass(frozen=True)
class Flushed:
    """What a commit did: how many rows, and the partitions that were refused."""

    rows: int = 0
    refused: Mapping[int, Refusal] = field(default_factory=dict)


class Writing:
    """One flush: decides against the newest snapshot, and keeps the files while they still fit.

    A partition's rows are refused when a later claim has it, or when they do not begin where the
    table ends (it was rolled back). Rows that the table has already, since an earlier try came
    through after all, are left out.
    """

    def __init__(self, taken: Mapping[int, Part], clock: Clock) -> None:
        self._taken = taken
        self._clock = clock
        self._files: list[DataFile] = []
        self._behind: dict[int, int] | None = None
        self._written_us = 0
        self.rows = 0
        self.refused: dict[int, Refusal] = {}

    def decide(self, table: Table, progress: TableProgress) -> Change | None:
        """See `commits.Decide`."""
        self.refused, behind = {}, {}
        for number, part in self._taken.items():
            stored = progress.of(number)
            replaced = stored.epoch > part.progress.epoch
            if replaced or stored.position < part.after:
                self.refused[number] = Refusal(part.progress.epoch, replaced)
            elif part.progress.position > stored.position:
                behind[number] = stored.position
        if not behind:
            self.rows = 0
            return None
        if behind != self._behind or progress.may_have_swept(self._written_us):
            self._write(table, behind)
        moved = {number: self._taken[number].progress for number in behind}
        return Change(progress.having(moved), self._files)

    def _write(self, table: Table, behind: dict[int, int]) -> None:
        """Write what lies behind the given positions. Files of an earlier try are orphans."""
        frames = [
            rows
            for number, at in behind.items()
            for frame in self._taken[number].frames
            if (rows := _behind(frame, at)).height
        ]
        self._behind, self._written_us = behind, self._clock.now_us()
        self.rows = sum(frame.height for frame in frames)
        reach(Point.LAKE_WRITING)
        self._files = write(table, filled(frames)) if frames else []
        reach(Point.LAKE_WRITTEN)


class Sink:
    """One table's rows in memory until they are enough for a snapshot.

    All but `flush` and `prepare` are for the event loop; those run in a thread, one at a time.
    """

    writing = Writing

    def __init__(
        self, catalog: Catalog, definition: TableDefinition, columns: pl.Schema, clock: Clock
    ) -> None:
        self.definition = definition
        self._catalog = catalog
        self._columns = columns
        self._clock = clock
        self._made = False  # whether the table is there with `_columns`
        self._parts: dict[int, Part] = {}
        self._taken: dict[int, Part] = {}
        self._since = clock.monotonic()
        self.rows = 0
        self.size_bytes = 0
        self._taken_bytes = 0

    @property
    def held_bytes(self) -> int:
        """What it holds in memory, rows in a commit included."""
        return self.size_bytes + self._taken_bytes

    @property
    def waits_s(self) -> float:
        """How long the oldest of what waits has waited; 0 when nothing does."""
        waits = self._parts or self._taken
        return self._clock.monotonic() - self._since if waits else 0.0

    @property
    def holds_rows(self) -> bool:
        """Whether rows wait, not only progress."""
        return any(part.frames for part in (*self._parts.values(), *self._taken.values()))

    def add(self, partition: int, part: Part) -> None:
        """Let rows wait, and the progress behind them."""
        if not self._parts and not self._taken:
            self._since = self._clock.monotonic()
        waiting = self._parts.setdefault(partition, Part(part.after, part.progress))
        waiting.progress = part.progress
        waiting.frames.extend(part.frames)
        self._count(part.frames, 1)

    def _count(self, frames: Sequence[pl.DataFrame], sign: int) -> None:
        self.rows += sign * sum(frame.height for frame in frames)
        self.size_bytes += sign * sum(int(frame.estimated_size()) for frame in frames)

    def drop(self, partition: int) -> None:
        """Forget what waits of a partition: it has been claimed anew and is read again."""
        gone = self._parts.pop(partition, None)
        if gone is not None:
            self._count(gone.frames, -1)

    def take(self) -> bool:
        """Set apart what waits, for `flush`; whether there is any."""
        if not self._taken:
            self._taken, self._parts = self._parts, {}
            self._since = self._clock.monotonic()
            self._taken_bytes = self.size_bytes
            self.rows = self.size_bytes = 0
        return bool(self._taken)

    def flush(self) -> Flushed:
        """Commit what was taken as one snapshot. After Retryable it waits on, and may be in the
        table already: the next flush finds out."""
        self.prepare()
        writing = self.writing(self._taken, self._clock)
        commit(self._catalog, self.definition.identifier, writing.decide)
        reach(Point.LAKE_COMMITTED)
        self._taken, self._taken_bytes = {}, 0
        return Flushed(writing.rows, writing.refused)

    def prepare(self) -> None:
        """Make the table, and give it the columns that came with newer schemas."""
        for part in self._taken.values():
            for frame in part.frames:
                if any(self._columns.get(name) != kind for name, kind in frame.schema.items()):
                    empty = pl.DataFrame(schema=self._columns)
                    self._columns = filled([empty, frame.clear()]).schema
                    self._made = False
        if not self._made:
            ensure(self._catalog, self.definition, self._columns)
            self._made = True


def _behind(frame: pl.DataFrame, position: int) -> pl.DataFrame:
    """The rows behind a position; rows are in log order."""
    if frame["_position"][0] > position:
        return frame
    return frame.filter(pl.col("_position") > position)
