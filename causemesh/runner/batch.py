"""What passes between the runner and a service: columns in, columns out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import polars as pl

from causemesh.bus.base import Positions, RawBatch
from causemesh.series import int64s, kept

Int32s = npt.NDArray[np.int32]

NEVER = -(2**62)
"""The watermark (microseconds) of a source that has promised nothing yet."""


@dataclass(frozen=True)
class Batch:
    """Fresh records of one partition as columns, replays already dropped.

    `frame` has the reader schema's columns, one row a record; `rows[i]` is the row of `raw` that
    frame row i came from. `bad` maps rows of `raw` that did not decode to the reason; the runner
    dead-letters them itself unless the processor asked for them (`Processor.takes_bad_rows`).
    On an inbox topic `promised_us[i]` is the watermark in force when row i of `raw` was written,
    so that what depends on it does not depend on where a batch ends.
    """

    topic: str
    partition: int
    frame: pl.DataFrame
    rows: npt.NDArray[np.int64]
    raw: RawBatch
    bad: Mapping[int, str] = field(default_factory=dict)
    promised_us: Positions | None = None

    @property
    def positions(self) -> Positions:
        """The position of each row of `frame`."""
        return self.raw.positions[self.rows]

    @property
    def occurred_at_us(self) -> Positions:
        """Event time of each row, microseconds."""
        return int64s(self.frame["occurred_at"])

    def __len__(self) -> int:
        return self.frame.height

    def without(self, rows: Sequence[int]) -> Batch:
        """The same batch less some frame rows."""
        keep = np.ones(len(self), dtype=bool)
        keep[list(rows)] = False
        return Batch(
            self.topic,
            self.partition,
            kept(self.frame, keep),
            self.rows[keep],
            self.raw,
            self.bad,
            self.promised_us,
        )


@dataclass(frozen=True)
class Outgoing:
    """Records for one topic, all caused by one (topic, partition), in cause order.

    `frame` holds the record's columns without `cause`; `event_id` is derived from the cause when
    the column is absent. `positions` and `indexes` (default 0) name each row's cause. `keys` are
    the message keys; a null key stays on the cause's partition number. `origins` (structs of topic,
    partition, position) names the records behind outbox rows.
    """

    topic: str
    frame: pl.DataFrame
    keys: Sequence[bytes | None]
    cause_topic: str
    cause_partition: int
    positions: Positions
    indexes: Int32s | None = None
    origins: pl.Series | None = None

    def __len__(self) -> int:
        return self.frame.height


@dataclass(frozen=True)
class Emission:
    """What one unit of work sends.

    `promises` maps an input topic to a watermark (microseconds) that replaces the one read from it,
    for processors that hold records back or make watermarks themselves. `refused` are batches with
    the frame rows that a part of the processor could not take, and why: they become dead letters
    although the rest of the processor took them (`Poison` is for rows that none takes). `commit`
    asks for the checkpoint with this unit, though none may be due: state changed by itself.
    """

    outgoing: Sequence[Outgoing] = ()
    promises: Mapping[str, int] = field(default_factory=dict)
    refused: Sequence[tuple[Batch, Mapping[int, str]]] = ()
    commit: bool = False


class Processor(Protocol):
    """A service's code for one partition.

    With a transactional store `transaction` is the open transaction: what it writes commits
    together with the positions, or not at all. A processor that emits must be a pure function of
    its inputs and its restored state, because a unit may run again after a crash.
    """

    takes_bad_rows: bool
    """Whether the processor reports undecodable rows itself (the door does)."""
    stateful: bool
    """Whether it keeps state between units in memory: then a failed unit is not repeated in place;
    the worker starts over from the checkpoint."""

    async def process(
        self, batches: Sequence[Batch], watermark_us: int, transaction: Any
    ) -> Emission:
        """Handle one unit: batches in log order, possibly none when only time moved."""

    def snapshot(self) -> bytes | None:
        """State to store beside the positions; None for a processor without state of its own."""

    def restore(self, state: bytes | None) -> None:
        """Go back to a stored state; None starts empty. Called once, before the first unit."""
