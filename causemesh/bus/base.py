"""The bus: the few things the mesh asks of a broker.

A **position** is an int64 that only grows along one partition: a Kafka offset, or a Pulsar message
id packed as ledger (31 bits), entry (20 bits) and batch index (12 bits). Reading is always "after"
a position, because Kafka seeks to an offset and Pulsar to the message *behind* an id; both
can say "go on after what I stored". `BEFORE_FIRST` reads a partition from its start.

Ownership and reading are apart: `Membership` says which partition numbers this process owns in
a group, `Reader` reads any partitions from any positions. The fence in the position store, not the
membership, keeps two owners from both committing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from causemesh.catalogue import Topic

Positions = npt.NDArray[np.int64]
TopicPartition = tuple[str, int]

BEFORE_FIRST = -1
TRACEPARENT = "traceparent"
"""The header (Kafka) or property (Pulsar) that carries a record's W3C trace context."""


class LogBlock(Protocol):
    """A run of records in the form in which the broker keeps them (Kafka's record batch v2)."""

    def __len__(self) -> int:
        """How many records."""

    @property
    def payload(self) -> bytes | None:
        """The records, uncompressed; None when they can only be read one by one."""

    @property
    def values(self) -> Sequence[bytes | None]:
        """The records' values, read one by one."""

    def known(
        self,
        keys: Callable[[], Sequence[bytes | None]],
        traces: Callable[[], Sequence[bytes | None] | None],
    ) -> None:
        """Take the keys and trace contexts from who has read the payload."""


@dataclass(frozen=True)
class RawBatch:
    """Records of one partition as they lie in the log; all sequences have one length.

    `positions` rise strictly. `appended_at_us` is the broker's append time (microseconds, UTC).
    `traceparents` are the records' W3C trace contexts; None where no record carries one. `blocks`
    hold the same records, all of them, for who can read many at once; empty where the broker's
    client gives records only. `more` says that the log was known to hold more behind them.
    """

    topic: str
    partition: int
    positions: Positions
    keys: Sequence[bytes | None]
    values: Sequence[bytes | None]
    appended_at_us: Positions
    traceparents: Sequence[bytes | None] | None = None
    blocks: Sequence[LogBlock] = ()
    more: bool = False

    def __len__(self) -> int:
        return len(self.values)


def picked(column: Sequence[bytes | None], rows: Sequence[int]) -> list[bytes | None]:
    """Some rows of a batch's keys or values. They may be lazy, and then each is found by a search:
    where half of them are asked for, all are read at once."""
    if 2 * len(rows) >= len(column):
        column = list(column)
    return [column[row] for row in rows]


@dataclass(frozen=True)
class Outbound:
    """Framed records for one output partition, in the order they must appear there.

    `traceparents`, one a record, travel as the header `traceparent`; None for records without.
    """

    topic: str
    partition: int
    keys: Sequence[bytes | None]
    values: Sequence[bytes]
    traceparents: Sequence[bytes | None] | None = None


class Reader(Protocol):
    """Reads a fixed set of partitions, each in order."""

    async def fetch(self, max_records: int, max_wait_s: float) -> list[RawBatch]:
        """About `max_records` records a partition; empty when none came within `max_wait_s`.

        Less than twice as many: a batch of the log that is no larger is not cut.
        """

    async def close(self) -> None:
        """Stop reading; safe to call twice."""


class Producer(Protocol):
    """Writes in order: the records of one partition appear as listed, or the call fails."""

    async def send(self, outbound: Sequence[Outbound]) -> None:
        """Return when every record is acknowledged.

        Raises Retryable when some were not; a prefix of each partition may have been written, and
        nothing behind a record that was not.
        """

    async def close(self) -> None:
        """Stop; what was not acknowledged may or may not have been written."""


class Membership(Protocol):
    """This process's share of a group over co-partitioned topics."""

    async def changed(self) -> frozenset[int]:
        """Wait for the next assignment; returns the partition numbers owned from now on."""

    async def report(self, positions: Mapping[TopicPartition, int]) -> None:
        """Tell the broker how far we are, for lag dashboards only."""

    async def close(self) -> None:
        """Leave the group at once, so that others take over without a session timeout."""


class Admin(Protocol):
    """Topics and their ends."""

    async def ensure(self, topics: Sequence[Topic]) -> list[str]:
        """Create what is missing and return those names.

        Raises Misdeclared when a topic exists with another partition count.
        """

    async def ends(self, topics: Sequence[str]) -> dict[TopicPartition, int]:
        """The last written position of every partition, `BEFORE_FIRST` when empty.

        Raises Retryable for a topic that does not exist (yet).
        """

    async def reported(self, group: str) -> dict[TopicPartition, int]:
        """The positions that members of `group` last reported."""

    async def close(self) -> None:
        """Close the connection."""


class Bus(Protocol):
    """A broker."""

    def reader(self, after: Mapping[TopicPartition, int]) -> Reader:
        """A reader that goes on after the given positions."""

    def producer(self, name: str) -> Producer:
        """A producer; `name` shows in the broker's logs."""

    def membership(self, group: str, topics: Sequence[str]) -> Membership:
        """Join `group`; all topics must have one partition count."""

    def admin(self) -> Admin:
        """An admin client."""

    async def close(self) -> None:
        """Close what the bus itself holds."""
