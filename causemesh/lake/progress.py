"""The progress that every snapshot of a lake table carries in its summary.

For each partition number of the topic behind the table: the epoch of the last claim, the position
up to which the table holds the topic, and the marks and promises that belong to that position. So
the position lives in the same atomic write as the effect, and rolling a table back rolls its
position back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from causemesh.bus.base import BEFORE_FIRST
from causemesh.errors import Fatal

if TYPE_CHECKING:
    from pyiceberg.table.metadata import TableMetadata
    from pyiceberg.table.snapshots import Snapshot

_PARTITION = "causemesh.partition."
_SWEPT = "causemesh.swept-us"
_SKEW_US = 60_000_000  # clocks of two machines differ by less


@dataclass(frozen=True)
class PartitionProgress:
    """How far a table holds one partition of its topic.

    `marks` rows are (cause topic, cause partition, position, index); `promises` rows are
    (cause topic, cause partition, watermark in microseconds).
    """

    epoch: int = 0
    position: int = BEFORE_FIRST
    marks: Sequence[Sequence[Any]] = ()
    promises: Sequence[Sequence[Any]] = ()


@dataclass(frozen=True)
class TableProgress:
    """The progress of a table. Data files written before `swept_us` (microseconds) and not
    committed by then may have been removed as orphans."""

    partitions: Mapping[int, PartitionProgress] = field(default_factory=dict)
    swept_us: int = 0

    def of(self, partition: int) -> PartitionProgress:
        """One partition's; from before the first record when the table has none of it."""
        return self.partitions.get(partition, PartitionProgress())

    def having(self, changed: Mapping[int, PartitionProgress]) -> TableProgress:
        """The same with some partitions replaced."""
        return replace(self, partitions={**self.partitions, **changed})

    def may_have_swept(self, written_us: int) -> bool:
        """Whether a file written at that time, and in no snapshot yet, may have been removed."""
        return written_us < self.swept_us + _SKEW_US

    def watermark_us(self) -> int | None:
        """The least promise over all partitions: the table holds everything before. None while a
        partition has none."""
        least = [
            min((int(row[2]) for row in one.promises), default=None)
            for one in self.partitions.values()
        ]
        known = [at_us for at_us in least if at_us is not None]
        return min(known) if known and len(known) == len(least) else None

    def summary(self) -> dict[str, str]:
        """As properties of a snapshot."""
        told = {
            f"{_PARTITION}{number}": json.dumps(
                [one.epoch, one.position, list(one.marks), list(one.promises)],
                separators=(",", ":"),
            )
            for number, one in sorted(self.partitions.items())
        }
        return told | ({_SWEPT: str(self.swept_us)} if self.swept_us else {})


def progress_in(snapshot: Snapshot) -> TableProgress | None:
    """What one snapshot's summary says; None when it says nothing."""
    told = dict(snapshot.summary.additional_properties) if snapshot.summary else {}
    partitions = {
        int(name.removeprefix(_PARTITION)): PartitionProgress(*json.loads(text))
        for name, text in told.items()
        if name.startswith(_PARTITION)
    }
    if not partitions and _SWEPT not in told:
        return None
    return TableProgress(partitions, int(told.get(_SWEPT, 0)))


def progress_of(metadata: TableMetadata) -> TableProgress:
    """The progress of a table as it is now.

    A snapshot without any was made by another tool (a compaction of Spark's, say); what its nearest
    ancestor says holds on. Raises Fatal when no ancestor is left that says something: guessing a
    position would lose or double records.
    """
    snapshot = metadata.current_snapshot()
    if snapshot is None:
        return TableProgress()
    while snapshot is not None:
        found = progress_in(snapshot)
        if found is not None:
            return found
        parent = snapshot.parent_snapshot_id
        snapshot = metadata.snapshot_by_id(parent) if parent is not None else None
    raise Fatal(
        f"no snapshot of {metadata.location} says how far it holds its topic; another tool wrote"
        " the table and the older snapshots are gone: drop the table, it is filled from the log"
    )
