"""Which events and tiles each window of each request covers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from services.features.domain.definitions import FeatureView
from services.features.domain.events import Ints
from services.features.domain.windows import Window
from services.features.offline.history import History


@dataclass(frozen=True)
class Asked:
    """Requests in order of entity and time: entity, a whole number or NOBODY, and as_of_us."""

    entity: Ints
    as_of_us: Ints

    def __len__(self) -> int:
        return len(self.entity)

    def take(self, chosen: Ints) -> Asked:
        """The chosen requests, in the order chosen."""
        return Asked(self.entity[chosen], self.as_of_us[chosen])


@dataclass(frozen=True)
class Span:
    """Of `n` requests what lies in a window: the events [low, high).

    Of those the tiles [first, whole) hold the older ones, each tile whole; the events from `part`
    on are the beginning of a tile that the as-of time cuts.
    """

    low: Ints
    high: Ints
    first: Ints
    whole: Ints
    part: Ints

    def block(self, chosen: slice) -> Span:
        """The same of some requests."""
        return Span(
            self.low[chosen],
            self.high[chosen],
            self.first[chosen],
            self.whole[chosen],
            self.part[chosen],
        )


def span_of(history: History, asked: Asked, window: Window) -> Span:
    """The span of a window, by its definition in `domain/windows.py`."""
    view = history.view
    if window.shape == "tumbling":
        return _tumbling(history, asked, window)
    newest = newest_tile(view, asked)
    first = history.tiles.before(asked.entity, newest - window.length_us // view.tile_us + 1)
    whole = history.tiles.before(asked.entity, newest)
    low = history.tile_starts[first]
    high = history.events.before(asked.entity, asked.as_of_us)
    span = Span(low, high, first, whole, history.tile_starts[whole])
    return _session(history, asked, window, span) if window.shape == "session" else span


def newest_tile(view: FeatureView, asked: Asked) -> Ints:
    """The tile that the last instant before each as-of time lies in."""
    return (asked.as_of_us - 1) // view.tile_us


def _tumbling(history: History, asked: Asked, window: Window) -> Span:
    """The last complete window: no tile of it is cut."""
    tile_us = history.view.tile_us
    end = asked.as_of_us // window.length_us * window.length_us // tile_us
    first = history.tiles.before(asked.entity, end - window.length_us // tile_us)
    whole = history.tiles.before(asked.entity, end)
    high = history.tile_starts[whole]
    return Span(history.tile_starts[first], high, first, whole, high)


def _session(history: History, asked: Asked, window: Window, near: Span) -> Span:
    """Of the near events those of the open session; it begins with a tile, as no tile is longer
    than the gap."""
    if not len(history):
        return near
    newest = near.high - 1
    follows_us = asked.as_of_us - history.at_us[newest]
    is_open = (near.high > near.low) & (follows_us <= window.part_us)
    began = np.maximum(near.low, history.gap_starts(window.part_us)[newest])
    low = np.where(is_open, began, near.high)
    first = np.where(is_open, history.tile_of[np.minimum(low, len(history) - 1)], near.whole)
    return Span(low, near.high, first, near.whole, np.maximum(near.part, low))


def expanded(low: Ints, high: Ints) -> tuple[Ints, Ints]:
    """All places in [low, high) of each request: whose each is, and the places."""
    sizes = np.maximum(high - low, 0)
    owners = np.repeat(np.arange(len(low)), sizes)
    first = np.repeat(low - (np.cumsum(sizes) - sizes), sizes)
    return owners, first + np.arange(len(owners))


def blocks(sizes: Ints, most: int) -> list[slice]:
    """Runs of requests whose sizes add up to about `most`, or single ones that are larger."""
    if not len(sizes):
        return []
    number = np.cumsum(sizes) // most
    starts = np.flatnonzero(np.diff(number, prepend=-1)).tolist()
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], len(sizes)], strict=True)]
