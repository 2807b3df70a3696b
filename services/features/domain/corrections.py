"""Corrections and retractions of events, by id, exact for every aggregation.

A minimum or a sketch can't be subtracted from. So a view that takes corrections keeps its events
for as long as an answer can see them, and an entity of which one is corrected is made anew from
those that count.

As of time `s` an event counts if it occurred before `s` and no correction of it did. A retraction
only removes; a correction removes and is itself an event. What was removed stays so, even when the
correction is corrected in turn. An event and its correction may come in any order. But one that
occurred before its event by more than an answer looks back (`reach_us`) never counts: so
corrections can be forgotten in time.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from services.features.domain.aggregates import RowEvents
from services.features.domain.definitions import CORRECTION_COLUMNS, FeatureView
from services.features.domain.events import NULL, Ints

Mask = npt.NDArray[np.bool_]


def reach_us(view: FeatureView) -> int:
    """How long before its event a counting correction may have occurred: as answers look back."""
    return max(view.tiles * view.tile_us, view.retention_us or 0)


class KeptEvents:
    """The events of a view that an answer may still see, corrections included."""

    def __init__(self, view: FeatureView) -> None:
        names = [column.name for column in view.columns]
        self._id, self._target, self._void = (names.index(name) for name in CORRECTION_COLUMNS)
        self._parts = [RowEvents.none(len(view.columns))]
        self._settled = 0
        self.unsaved: list[RowEvents] | None = None
        """What was added since the last checkpoint; None where nobody asks."""
        self._reach_us = reach_us(view)

    @property
    def events(self) -> RowEvents:
        """All of them, in no order."""
        self._parts = [RowEvents.concatenate(self._parts)]
        return self._parts[0]

    def add(self, events: RowEvents) -> None:
        """Keep these too."""
        self._parts.append(events)
        if self.unsaved is not None:
            self.unsaved.append(events)

    def prune(self, from_us: int) -> None:
        """Forget events before this time, once there are many.

        Corrections stay for as long as an event they name can be visible.
        """
        if sum(map(len, self._parts)) > 2 * self._settled:
            self._parts = [self.visible(self.events, from_us)]
            self._settled = len(self._parts[0])

    def visible(self, events: RowEvents, from_us: int) -> RowEvents:
        """Those of the events that are kept when answers see none before this time."""
        corrects = events.values[self._target] != NULL
        needed_us = from_us - np.where(corrects, self._reach_us, 0)
        return events.take(events.occurred_at_us >= needed_us)

    def take_unsaved(self) -> RowEvents:
        """What was added since the last checkpoint; starts again."""
        found, self.unsaved = self.unsaved or [], []
        return RowEvents.concatenate([RowEvents.none(len(self._parts[0].values)), *found])

    def drop(self, rows: Ints | slice) -> None:
        """Forget the events of these rows."""
        events = self.events
        if isinstance(rows, slice):
            gone = (events.rows >= rows.start) & (events.rows < rows.stop)
        else:
            gone = np.isin(events.rows, rows)
        if gone.any():
            self._parts = [events.take(~gone)]

    def corrected_rows(self, more: RowEvents) -> Ints:
        """The rows whose answer is not just that over what is kept and `more`: rising, unique."""
        kept = self.events
        new, old = more.values[self._target], kept.values[self._target]
        new, old = new[new != NULL], old[old != NULL]
        if not len(new) and not len(old):
            return np.empty(0, np.int64)
        parts = [
            kept.rows[np.isin(kept.values[self._id], new)],
            more.rows[np.isin(more.values[self._id], np.concatenate([new, old]))],
            more.rows[more.values[self._target] != NULL],
        ]
        return np.unique(np.concatenate(parts))

    def counting(self, rows: Ints, more: RowEvents) -> RowEvents:
        """Of what is kept and `more`, the events of these rows that count."""
        every = RowEvents.concatenate([self.events, more])
        chosen = np.isin(every.rows, rows) & (every.values[self._void] == NULL)
        return every.take(chosen & ~self._removed(every))

    def _removed(self, every: RowEvents) -> Mask:
        """Which events are named by a correction among them that is not too early for them."""
        targets = every.values[self._target]
        fixes = np.flatnonzero(targets != NULL)
        if not len(fixes):
            return np.zeros(len(every), np.bool_)
        fixes = fixes[np.lexsort((every.occurred_at_us[fixes], targets[fixes]))]
        newest = fixes[np.flatnonzero(np.append(np.diff(targets[fixes]), 1))]
        at = np.searchsorted(targets[newest], every.values[self._id])
        fix = newest[np.minimum(at, len(newest) - 1)]
        early_us = every.occurred_at_us - every.occurred_at_us[fix]
        return np.asarray((targets[fix] == every.values[self._id]) & (early_us <= self._reach_us))

    def memory_bytes(self) -> int:
        """Bytes of the columns."""
        return sum((4 + len(part.values)) * 8 * len(part) for part in self._parts)

    def plain(self, events: RowEvents, corrected: Ints) -> RowEvents:
        """The events of rows in which nothing is corrected."""
        return events.take(~np.isin(events.rows, corrected)) if len(corrected) else events
