"""A view's vectors over time: what Feast looks up where Causemesh computes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import polars as pl

from causemesh.errors import Misdeclared
from services.features.domain.definitions import FeatureView
from services.features.domain.engine import ViewState
from services.features.domain.events import SEPARATOR, ViewEvents, readable_events
from services.features.domain.vectors import Vectors, row_bytes

TIMESTAMP = "event_timestamp"


def key_columns(view: FeatureView) -> tuple[str, ...]:
    """What the entity keys of a view are joined from, by the names that requests use."""
    return (*(("tenant_id",) if view.scope == "tenant" else ()), *view.request_entity)


def vector_history(
    view: FeatureView, events: Iterable[pl.DataFrame], every_us: int
) -> Iterator[pl.DataFrame]:
    """The vectors of all entities at the whole multiples of `every_us`, where they changed.

    `events` come in order of event time, as `readable_events` takes them. A row at T says what the
    events before T say; an entity without a row at T has the vector of its newest row before.
    So for any such multiple T, the newest row up to T is the answer as of T, bit for bit. The rows
    go on after the last event until no answer changes any more; ages change until the view's
    retention, and a view of ages without one raises Misdeclared.

    Columns: those of the key as text, event_timestamp (UTC), and the features: float32, null where
    there is no number.
    """
    if view.retention_us is None and any(f.aggregation == "age" for f in view.features):
        raise Misdeclared(f"view {view.id}: an age without a retention changes for ever")
    history = _History(view)
    next_us = 0
    for part in _by_time(view, events):
        times = part.occurred_at_us
        while len(times):
            start_us = int(times[0]) // every_us * every_us + every_us
            while history.may_change(next_us, every_us) and next_us < start_us:
                yield history.at(next_us)
                next_us += every_us
            inside = int(np.searchsorted(times, start_us))
            history.apply(part.take(np.arange(inside)))
            part = part.take(np.arange(inside, len(part)))  # noqa: PLW2901 - what is left of it
            times, next_us = part.occurred_at_us, start_us
    while history.may_change(next_us, every_us):
        yield history.at(next_us)
        next_us += every_us


def _by_time(view: FeatureView, events: Iterable[pl.DataFrame]) -> Iterator[ViewEvents]:
    newest_us: int | None = None
    for frame in events:
        part, _ = readable_events(view, frame)  # what the view can't take it never had
        if not len(part):
            continue
        part = part.take(np.argsort(part.occurred_at_us, kind="stable"))
        if newest_us is not None and part.occurred_at_us[0] < newest_us:
            raise Misdeclared(f"view {view.id}: the frames of events are not in order of time")
        newest_us = int(part.occurred_at_us[-1])
        yield part


class _History:
    """The state of a view, and the vectors that were told last."""

    def __init__(self, view: FeatureView) -> None:
        self._view = view
        self._state = ViewState(view)
        self._told: dict[str, bytes] = {}
        self._newest_us: int | None = None
        self._reach_us = max((view.tiles + 1) * view.tile_us, view.retention_us or 0)

    def may_change(self, as_of_us: int, every_us: int) -> bool:
        """Whether an answer as of then may differ from that as of `every_us` before."""
        if self._newest_us is None:
            return False
        return as_of_us - every_us <= self._newest_us + self._reach_us

    def apply(self, events: ViewEvents) -> None:
        """Take events that are newer than any answer told."""
        self._state.apply(events)
        self._newest_us = int(events.occurred_at_us[-1])

    def at(self, as_of_us: int) -> pl.DataFrame:
        """The vectors as of then that are news."""
        state = self._state
        keys = state.index.keys
        matrix = np.ascontiguousarray(state.answer(keys, np.full(len(keys), as_of_us, np.int64)))
        vectors = row_bytes(matrix)
        news = [
            at
            for at, (key, vector) in enumerate(zip(keys, vectors, strict=True))
            if self._told.get(key) != vector
        ]
        self._told.update((keys[at], vectors[at]) for at in news)
        state.apply(ViewEvents.none(self._view), as_of_us)
        if state.evict(as_of_us):
            self._told = {key: self._told[key] for key in state.index.keys}
        found = np.array(news, np.int64)
        return _frame(self._view, [keys[at] for at in news], as_of_us, matrix[found])


def _frame(view: FeatureView, keys: list[str], as_of_us: int, matrix: Vectors) -> pl.DataFrame:
    names = key_columns(view)
    parts = [_parts(key, len(names)) for key in keys]
    at = pl.Series(TIMESTAMP, [as_of_us] * len(keys), dtype=pl.Int64)
    features = [
        pl.Series(feature.name, matrix[:, place], nan_to_null=True)
        for place, feature in enumerate(view.features)
    ]
    columns = [
        pl.Series(name, [part[place] for part in parts], dtype=pl.String)
        for place, name in enumerate(names)
    ]
    return pl.DataFrame([*columns, at.cast(pl.Datetime("us", "UTC")), *features])


def _parts(key: str, count: int) -> list[str]:
    """The parts of a key, as `entity_keys` was given them: all but the last are escaped."""
    *first, last = key.split(SEPARATOR, count - 1)
    return [
        *(part.replace("\x1e1", SEPARATOR).replace("\x1e0", "\x1e") for part in first),
        last,
    ]
