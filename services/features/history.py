"""The past of an entity's features, recomputed from the log."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

import numpy as np
import polars as pl

from causemesh.log import LogReader
from causemesh.runner import Batch
from services.features.domain.definitions import FeatureView
from services.features.domain.engine import ViewState
from services.features.domain.events import Ints, ViewEvents, readable_events
from services.features.domain.vectors import Vectors
from services.features.plan import event_frame


@dataclass(frozen=True)
class Period:
    """Event times from `from_us` on and before `to_us`; None is open."""

    from_us: int | None
    to_us: int | None

    def holds(self, at_us: Ints) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
        """Which of the times are inside."""
        inside = np.ones(len(at_us), np.bool_)
        if self.from_us is not None:
            inside &= at_us >= self.from_us
        if self.to_us is not None:
            inside &= at_us < self.to_us
        return inside


@dataclass(frozen=True)
class Past:
    """`n` vectors, float32 [n, features], each just after an event: as of `as_of_us` [n], rising.

    `skipped` is how many earlier ones of the period the limit left out.
    """

    as_of_us: Ints
    vectors: Vectors
    skipped: int


class History:
    """Reads a view's whole event topic for each question: for people, not for requests."""

    def __init__(self, log: LogReader) -> None:
        self._log = log

    async def read(self, view: FeatureView, key: str, period: Period, limit: int) -> Past:
        """The vectors just after each of the entity's events in the period, the newest `limit`.

        As a live request would have seen them had every event come in time: an event that came
        too late for the view is in the log, and counts here.
        """
        parts = [part async for part in self._events(view, key)]
        times = np.unique(
            np.concatenate([np.empty(0, np.int64), *(p.occurred_at_us for p in parts)])
        )
        asked = times[period.holds(times)]
        chosen = asked[-limit:]
        if not len(chosen):
            return Past(chosen, np.empty((0, len(view.features)), np.float32), 0)
        as_of_us = np.asarray(chosen + 1)
        state = ViewState(view)
        coded = [state.encode(part) for part in parts]
        rows = state.index.find(pl.Series("entity", [key] * len(chosen), dtype=pl.String))
        vectors = state.answer_rows(rows, as_of_us, coded)
        return Past(as_of_us, vectors, len(asked) - len(chosen))

    async def _events(self, view: FeatureView, key: str) -> AsyncIterator[ViewEvents]:
        async for batch in self._log.read(await self._log.ends([f"events.{view.event_type}"])):
            found = self._seen(view, batch)
            mine = np.flatnonzero((found.entity == key).to_numpy())
            if len(mine):
                yield found.take(mine)

    def _seen(self, view: FeatureView, batch: Batch) -> ViewEvents:
        """What the view sees of a batch, less the rows that it can't take (dead letters)."""
        found, _ = readable_events(view, event_frame(batch))
        return found
