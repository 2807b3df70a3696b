"""The past of a view in one partition: which events it is made of, and the state over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from causemesh.bus.partitioner import partitions_of
from services.features.domain.corrections import reach_us
from services.features.domain.definitions import FeatureView
from services.features.domain.engine import ViewState
from services.features.domain.events import Ints, ViewEvents, event_columns, readable_events
from services.features.rekeying import routing_keys


@dataclass(frozen=True)
class Order:
    """A past to be computed: a view's, for one partition of the requests.

    `cuts`: by partition of the view's event topic, the last position that belongs to the past.
    Events before `until_us` are applied, later ones are handed over as they are (None: all are).
    """

    view: FeatureView
    partition: int
    cuts: Mapping[int, int]
    until_us: int | None

    @property
    def topic(self) -> str:
        """The topic of the view's events."""
        return f"events.{self.view.event_type}"

    @property
    def from_us(self) -> int | None:
        """The earliest event time that an answer to come can see; None when there is no bound."""
        return None if self.until_us is None else needed_from_us(self.view, self.until_us)


@dataclass(frozen=True)
class Made:
    """A past: its state, the events to be applied later, and how much it is made of.

    `unfit`: records left out because a view can't take them. `complete_from_us`: the past holds
    every event since then (None: since ever, or as far back as an answer can see).
    """

    state: ViewState
    ahead: ViewEvents
    events: int
    unfit: int
    complete_from_us: int | None


def needed_from_us(view: FeatureView, until_us: int) -> int | None:
    """The earliest event time that an answer as of `until_us` or later can see; None: any."""
    seen = []
    if any(feature.window_us is None for feature in view.features):
        if view.retention_us is None:
            return None
        seen.append(until_us - view.retention_us)
    if view.tiles:
        seen.append(((until_us - 1) // view.tile_us - view.tiles + 1) * view.tile_us)
    # a correction counts for as long before its event as answers look back
    return min(seen) - (reach_us(view) if view.corrects or view.retracts else 0)


class Filling:
    """The state of one past while its events come, in any order, each once."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self._state = ViewState(order.view)
        self._ahead = [ViewEvents.none(order.view)]
        self._events = 0
        self.unfit = 0

    def add(self, found: ViewEvents, numbers: Ints | None) -> None:
        """Take those of the events that belong to this past.

        `numbers`: the partition that each is re-keyed to; None for a view that is not re-keyed.
        """
        mine = np.zeros(len(found), np.bool_)
        for number, cut in self.order.cuts.items():
            mine |= (found.source == number) & (found.position <= cut)
        if self.order.from_us is not None:
            mine &= found.occurred_at_us >= self.order.from_us
        if numbers is not None:
            mine &= numbers == self.order.partition
        if self.order.until_us is None:
            later = mine
        else:
            later = mine & (found.occurred_at_us >= self.order.until_us)
        if later.any():
            self._ahead.append(found.take(np.flatnonzero(later)))
        now = mine & ~later
        if now.any():
            self._state.apply(found if now.all() else found.take(np.flatnonzero(now)))
        self._events += int(np.count_nonzero(mine))

    def made(self, complete_from_us: int | None) -> Made:
        """What has come of it."""
        ahead = ViewEvents.concatenate(self._ahead)
        return Made(self._state, ahead, self._events, self.unfit, complete_from_us)


class Routing:
    """The partitions that a re-keyed view's entities belong to, each worked out once."""

    def __init__(self, view: FeatureView, partitions: int) -> None:
        self._view = view
        self._partitions = partitions
        self._known: dict[str, int] = {}

    def numbers(self, entities: pl.Series) -> Ints:
        """The partition of each entity: int64 [n]."""
        names = entities.to_list()
        strangers = list(set(names).difference(self._known))
        if strangers:
            keys = routing_keys(self._view, pl.Series("entity", strangers, dtype=pl.String))
            encoded: list[bytes | None] = [key.encode() for key in keys.to_list()]
            chosen = partitions_of(encoded, self._partitions, unkeyed=0)
            self._known.update(zip(strangers, chosen.tolist(), strict=True))
        return np.fromiter((self._known[name] for name in names), np.int64, len(names))


class TopicPass:
    """One reading of an event topic for all pasts that are made of it."""

    def __init__(self, orders: Sequence[Order], partitions: int) -> None:
        (self.topic,) = {order.topic for order in orders}
        self._fillings = [Filling(order) for order in orders]
        self._views = {order.view.id: order.view for order in orders}
        self._routing = {
            order.view.id: Routing(order.view, partitions)
            for order in orders
            if order.view.placement == "rekeyed"
        }

    @property
    def columns(self) -> frozenset[str]:
        """The columns that a frame must have."""
        return frozenset[str]().union(*map(event_columns, self._views.values()))

    @property
    def from_us(self) -> int | None:
        """The earliest event time that any of the pasts needs; None when there is no bound."""
        bounds = [filling.order.from_us for filling in self._fillings]
        known = [at for at in bounds if at is not None]
        return min(known) if len(known) == len(bounds) else None

    @property
    def cuts(self) -> dict[int, int]:
        """By partition of the topic, the last position that any of the pasts needs."""
        found: dict[int, int] = {}
        for filling in self._fillings:
            for partition, at in filling.order.cuts.items():
                found[partition] = max(at, found.get(partition, at))
        return found

    def take(self, frame: pl.DataFrame) -> None:
        """Add events, as `event_frame` makes them."""
        for name, view in self._views.items():
            found, unfit = readable_events(view, frame)
            numbers = None
            if name in self._routing:
                numbers = self._routing[name].numbers(found.entity)
            for filling in self._fillings:
                if filling.order.view.id == name:
                    filling.unfit += len(unfit)
                    filling.add(found, numbers)

    def made(self, complete_from_us: Mapping[int, int | None]) -> list[Made]:
        """The pasts, in the order of the orders; `complete_from_us` is by partition."""
        found = []
        for filling in self._fillings:
            needed_us = filling.order.from_us
            since = [complete_from_us[k] for k in filling.order.cuts]
            lacking = [
                at for at in since if at is not None and (needed_us is None or needed_us < at)
            ]
            if filling.order.until_us is not None:  # what comes later comes live
                lacking = [min(at, filling.order.until_us) for at in lacking]
            found.append(filling.made(max(lacking, default=None)))
        return found
