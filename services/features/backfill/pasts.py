"""Reads the events of pasts: from the lake what it holds, from the log what the lake lacks.

The lake holds a topic up to a position, which lies in the snapshot that the rows are read from, and
has done so since it has rows of it, but for the days that its retention took out. So three parts
make up the past of a partition, and no event is in two of them:

1. the lake's rows, up to its position (or the cut, if that is lower);
2. the log behind the lake's position, up to the cut; the marks of that position are in the
   snapshot too, so what was sent twice across it counts once;
3. where an answer can look back further than the lake reliably does, and the log reaches back
   further than the lake: the records up to the lake's position that occurred before, and that the
   lake does not hold.

Without a lake the log is all there is. What neither holds is told, as the event time since which
the past is complete.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import polars as pl

from causemesh.bus.base import BEFORE_FIRST
from causemesh.catalogue import Catalogue
from causemesh.errors import Gone
from causemesh.faultpoints import Point, reach
from services.features.backfill.filling import Made, Order, TopicPass
from services.features.backfill.log_past import Beginning, LogPast, Span
from services.features.domain.events import Ints
from services.features.plan import REQUESTS, event_frame

if TYPE_CHECKING:
    from services.features.backfill.lake_past import LakePast

FindPast = Callable[[str], "LakePast | None"]
"""What the lake holds of a topic now; it blocks. Raises Retryable."""
Tell = Callable[[int], None]
"""Hears the percentage that is done."""
_OF_LAKE = 90  # percent, where there is a lake


def complete_from(
    needed_us: int | None,
    lake_us: int | None,
    begins: Beginning | None,
    *,
    gap: bool,
    cut: int,
) -> int | None:
    """The event time since which the past of a partition is complete; None when it wholly is.

    needed_us: the earliest that an answer can see, None for any; lake_us: since when the lake
    reliably holds the topic, None when it does not; begins: where the log begins, None when it
    holds nothing of the past; gap: whether the log begins behind what the lake holds.
    """
    if cut == BEFORE_FIRST:
        return None
    log_us = None if begins is None else begins.since_us
    if gap:
        return log_us if log_us is not None else _NOTHING_US
    if begins is not None and begins.position == 0:
        return None  # nothing was ever deleted from it, and the lake began there
    known = [at_us for at_us in (lake_us, log_us) if at_us is not None]
    since_us = min(known, default=_NOTHING_US)
    return None if needed_us is not None and needed_us >= since_us else since_us


_NOTHING_US = 2**62
"""Complete from never on: neither holds anything of what was there."""


@dataclass
class _Lake:
    """What was read of the lake: by partition up to which position; the places of what occurred
    before it is reliable."""

    past: LakePast | None
    reliable_us: int | None
    early: list[tuple[Ints, Ints]]

    def position(self, partition: int) -> int:
        return BEFORE_FIRST if self.past is None else self.past.position(partition)

    def note(self, frame: pl.DataFrame) -> None:
        """Remember the rows from before it is reliable."""
        if self.reliable_us is None:
            return
        early = frame["occurred_at_us"].to_numpy() < self.reliable_us
        if early.any():
            at = frame.filter(pl.Series(early))
            self.early.append((at["source"].to_numpy(), at["position"].to_numpy()))

    def holds(self, source: int, positions: Ints) -> npt.NDArray[np.bool_]:
        """Which of these early records of a source were among its rows."""
        found = [at[sources == source] for sources, at in self.early]
        held = np.concatenate(found) if found else np.empty(0, np.int64)
        return np.asarray(np.isin(positions, held))


class Pasts:
    """See the module's docstring."""

    def __init__(
        self,
        catalogue: Catalogue,
        log: LogPast,
        find_past: FindPast | None,
    ) -> None:
        self._catalogue = catalogue
        self._log = log
        self._find_past = find_past

    async def compute(self, orders: Sequence[Order], tell: Tell) -> list[Made]:
        """The pasts that are ordered, all of one event topic. Raises Retryable, Misdeclared."""
        partitions = self._catalogue.topic(REQUESTS).partitions
        reading = TopicPass(orders, partitions)
        lake = await self._read_lake(reading, tell)
        reach(Point.BACKFILL_READ)
        since: dict[int, int | None] = {}
        for done, (number, cut) in enumerate(sorted(reading.cuts.items())):
            since[number] = await self._read_log(reading, lake, number, cut)
            first = _OF_LAKE if lake.past is not None else 0
            tell(first + (100 - first) * (done + 1) // len(reading.cuts))
        return reading.made(since)

    async def _read_lake(self, reading: TopicPass, tell: Tell) -> _Lake:
        past = None
        if self._find_past is not None:
            past = await asyncio.to_thread(self._find_past, reading.topic)
        if past is None:
            return _Lake(None, None, [])
        lake = _Lake(past, await asyncio.to_thread(lambda: past.reliable_us), [])
        total, done = await asyncio.to_thread(past.rows, reading.from_us), 0
        frames = past.frames(reading.columns, reading.from_us)
        while (count := await asyncio.to_thread(_take_next, frames, reading, lake)) is not None:
            done += count
            tell(min(_OF_LAKE, _OF_LAKE * done // max(1, total)))
        return lake

    async def _read_log(self, reading: TopicPass, lake: _Lake, number: int, cut: int) -> int | None:
        """Read one partition's part of the log; returns since when the past is complete."""
        if cut == BEFORE_FIRST:
            return None
        after, needed_us = lake.position(number), reading.from_us
        reliable_us = None if after == BEFORE_FIRST else lake.reliable_us
        sure = reliable_us is not None and needed_us is not None and needed_us >= reliable_us
        gap = after < cut and await self._read_behind(reading, lake, number, (after, cut))
        if sure and not gap:
            return None
        begins = await self._log.beginning(reading.topic, number, cut)
        log_us = None if begins is None else begins.since_us
        if reliable_us is not None and log_us is not None and log_us < reliable_us:
            await self._read_early(reading, lake, number, (min(after, cut), reliable_us))
        return complete_from(needed_us, reliable_us, begins, gap=gap, cut=cut)

    async def _read_behind(self, reading: TopicPass, lake: _Lake, number: int, span: Span) -> bool:
        """Read the log behind what the lake holds; returns whether it begins later than that."""
        topic, (after, cut) = reading.topic, span
        marks = [] if lake.past is None else lake.past.marks([number])
        taken = False

        async def read(start: int) -> None:
            nonlocal taken
            async for batch in self._log.batches(topic, {number: (start, cut)}, marks):
                frame = event_frame(batch).filter(pl.col("position") > after)
                await asyncio.to_thread(reading.take, frame)
                taken = True

        try:
            await read(after)
        except Gone:  # the log no longer holds where it should begin
            if taken or after == BEFORE_FIRST:
                raise
            await read(BEFORE_FIRST)
            return True
        return False

    async def _read_early(
        self, reading: TopicPass, lake: _Lake, number: int, bounds: tuple[int, int]
    ) -> None:
        """Read what occurred before the lake is reliable, as far as it does not hold it.

        bounds: the last position, and since when it is reliable.
        """
        last, reliable_us = bounds
        span = {number: (BEFORE_FIRST, last)}
        async for batch in self._log.batches(reading.topic, span, []):
            frame = event_frame(batch)
            early = frame["occurred_at_us"].to_numpy() < reliable_us
            lacking = early & ~lake.holds(number, batch.positions)
            if lacking.any():
                await asyncio.to_thread(reading.take, frame.filter(pl.Series(lacking)))


def _take_next(frames: Iterator[pl.DataFrame], reading: TopicPass, lake: _Lake) -> int | None:
    frame = next(frames, None)
    if frame is None:
        return None
    lake.note(frame)
    reading.take(frame)
    return frame.height
