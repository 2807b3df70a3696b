"""Requests that see other events than those that count in the end.

Events are as in `history.py`, and have besides: since, the as-of time after which they count, and
until, the last one that they count for, or null. Most count since their own time and for good: of
those the places in the order of time say which a request sees. Some came late, so that they count
since later, or were corrected. Between two times at which one of an entity's begins or ceases to
count, the same of them count: the requests in between are answered together, from events laid out
for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import polars as pl

from services.features.domain.corrections import reach_us
from services.features.domain.definitions import FeatureView
from services.features.domain.events import Ints
from services.features.offline.history import Mask, Places
from services.features.offline.spans import Asked, blocks, expanded

LASTING = pl.col("until").is_null()
"""The events that count in the end."""
_LATE = pl.col("since") > pl.col("at")


@dataclass(frozen=True)
class LaidOut:
    """Some of the requests, by their places, with the events that they see; an entity is one of
    these `spells` there."""

    places: Ints
    asked: Asked
    events: pl.DataFrame


def meanwhile(events: pl.DataFrame, asked: Asked) -> Mask:
    """Which requests see other events than the lasting ones before their as-of time: one that was
    corrected later, or without one that came late."""

    def before(some: pl.DataFrame, time: str) -> Ints:
        return _places(some, time).before(asked.entity, asked.as_of_us)

    brief, late = events.filter(~LASTING), events.filter(LASTING & _LATE)
    corrected = before(brief, "since") > before(brief, "until")
    return np.asarray(corrected | (before(late, "at") > before(late, "since")))


def laid_out(view: FeatureView, events: pl.DataFrame, asked: Asked, most: int) -> Iterator[LaidOut]:
    """The requests with the events that count for each; about `most` events are laid out at once.

    Requests are in the order of `Asked`.
    """
    if not len(asked):
        return
    starts = _spells(events, asked)
    first = asked.take(starts)
    ends = np.append(starts[1:], len(asked))
    ordered = events.sort("entity", "at")
    places = Places(ordered["entity"].to_numpy(), ordered["at"].to_numpy())
    low = places.before(first.entity, first.as_of_us - _look_back_us(view))
    high = places.before(first.entity, asked.as_of_us[ends - 1])
    for block in blocks(high - low + 1, most):
        owners, at = expanded(low[block], high[block])
        laid = ordered[at].with_columns(
            pl.Series("entity", owners), pl.Series("as_of", first.as_of_us[block][owners])
        )
        begun = pl.col("since") < pl.col("as_of")
        counts = begun & (LASTING | (pl.col("until") >= pl.col("as_of")))
        chosen = np.arange(starts[block.start], ends[block.stop - 1])
        sizes = (ends - starts)[block]
        own = Asked(np.repeat(np.arange(len(sizes)), sizes), asked.as_of_us[chosen])
        yield LaidOut(chosen, own, laid.filter((LASTING & ~_LATE) | counts).drop("as_of"))


def _spells(events: pl.DataFrame, asked: Asked) -> Ints:
    """Where runs of requests of one entity begin for which the same events count, of those that
    don't count since their own time and for good."""
    special = events.filter(~LASTING | _LATE)
    turns = [
        special.select("entity", turn="since"),
        special.filter(~LASTING).select("entity", turn="until"),
    ]
    passed = _places(pl.concat(turns), "turn").before(asked.entity, asked.as_of_us)
    changes = np.diff(asked.entity, prepend=-2) | np.diff(passed, prepend=-1)
    return np.flatnonzero(changes)


def _look_back_us(view: FeatureView) -> int:
    """How long before its as-of time an answer can see an event."""
    if view.retention_us is None and any(one.window is None for one in view.features):
        return _ANY_US
    return reach_us(view)


_ANY_US = 2**60


def _places(events: pl.DataFrame, time: str) -> Places:
    ordered = events.sort("entity", time)
    return Places(ordered["entity"].to_numpy(), ordered[time].to_numpy())
