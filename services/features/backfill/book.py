"""What one partition knows of the views whose past it lacks; part of its checkpoint.

A view that the saved state does not know runs live at once. Its past is what lies in the log up to
its *cut*, one position for each partition of its events: where this partition's own reading had
got, or the log's end where it reads them for the first time or by way of the re-keying stage. What
comes live from before the cut is left out, so each event counts once. The view is offered when the
past has been merged and that has been committed.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from causemesh.bus.base import BEFORE_FIRST, TopicPartition
from causemesh.catalogue import Catalogue
from causemesh.faultpoints import Point, reach
from services.features.backfill.filling import Made, Order
from services.features.domain.definitions import FeatureView
from services.features.domain.events import Ints, ViewEvents

Positions = Callable[[], Mapping[TopicPartition, int]]
"""The last position of each input partition that the restored state holds."""
Ends = Callable[[Sequence[str]], Awaitable[Mapping[TopicPartition, int]]]
"""The last written position of every partition of topics."""


@dataclass
class Entry:
    """One view's past.

    `cuts`: by partition of the event topic, the last position that is past; `guarded`: those of
    them that what comes live may still be before. `done`: it was merged; `unfit` and
    `complete_from_us` are then what `Made` said.
    """

    cuts: dict[int, int] = field(default_factory=dict)
    guarded: list[int] = field(default_factory=list)
    placed: bool = False
    done: bool = False
    unfit: int = 0
    complete_from_us: int | None = None


@dataclass(frozen=True)
class Shown:
    """What is told of a view: `state` is "offered", "backfilling" or "committing"."""

    state: str
    percent: int
    waits: str | None
    cuts: Mapping[int, int]
    unfit: int
    complete_from_us: int | None

    @property
    def rank(self) -> tuple[bool, int]:
        """Less for a view that is further from being offered."""
        return self.state == "offered", self.percent


class Backfills:
    """The pasts of one partition. See the module's docstring."""

    def __init__(self, views: Iterable[FeatureView], catalogue: Catalogue, partition: int) -> None:
        self._views = {view.id: view for view in views}
        self._partitions = {name: topic.partitions for name, topic in catalogue.topics.items()}
        self.partition = partition
        self._entries: dict[str, Entry] = {}
        self._merged: set[str] = set()
        self._dumped: set[str] = set()
        self._made: dict[str, Made] = {}
        self._percent: dict[str, int] = {}
        self._waits: dict[str, str] = {}
        self._read: dict[TopicPartition, int] = {}

    def begin(self, new: Iterable[str], positions: Mapping[TopicPartition, int]) -> None:
        """Note the views that the restored state does not know, and how far it has read."""
        self._read = dict(positions)
        for name in new:
            self._entries[name] = Entry()

    def dump(self) -> bytes:
        """All of it as JSON, to be committed with the state."""
        self._dumped = set(self._merged)
        return json.dumps({name: asdict(one) for name, one in self._entries.items()}).encode()

    def load(self, saved: bytes) -> None:
        """Take over what `dump` wrote; what it says of views that are no longer declared goes."""
        for name, one in json.loads(saved).items():
            if name in self._views:
                cuts = {int(partition): at for partition, at in one["cuts"].items()}
                self._entries[name] = Entry(**{**one, "cuts": cuts})

    def committed(self) -> list[str]:
        """Hear that what was dumped last is committed; returns the views offered from now on."""
        offered = sorted(self._dumped)
        self._merged -= self._dumped
        self._dumped = set()
        return offered

    @property
    def held(self) -> frozenset[str]:
        """The views that are not offered."""
        lacking = {name for name, one in self._entries.items() if not one.done}
        return frozenset(lacking | self._merged)

    def offered(self, rows: Mapping[str, Ints]) -> dict[str, Ints]:
        """Of rows by view, those of views that are offered."""
        held = self.held
        return {name: some for name, some in rows.items() if name not in held}

    async def place(self, ends: Ends) -> None:
        """Give each past that has none yet its cut."""
        new = {name: one for name, one in self._entries.items() if not one.placed}
        if not new:
            return
        topics = sorted({self._topic(name) for name in new})
        last = await ends(topics)
        for name, entry in new.items():
            topic = self._topic(name)
            for number in self._numbers(name):
                read = self._own_reading(name, (topic, number))
                entry.cuts[number] = last[(topic, number)] if read is None else read
                if read is None:
                    entry.guarded.append(number)
            entry.placed = True
        reach(Point.BACKFILL_PLACED)

    def _topic(self, name: str) -> str:
        return f"events.{self._views[name].event_type}"

    def _numbers(self, name: str) -> Sequence[int]:
        """The partitions of the event topic that the view is made of."""
        if self._views[name].placement == "partitioned":
            return [self.partition]
        return range(self._partitions[self._topic(name)])

    def _own_reading(self, name: str, source: TopicPartition) -> int | None:
        """How far this partition had read the source itself; None where it had not."""
        at = self._read.get(source, BEFORE_FIRST)
        return None if self._views[name].placement == "rekeyed" or at == BEFORE_FIRST else at

    def since_the_cut(
        self, view: FeatureView, events: ViewEvents, positions: Ints
    ) -> tuple[FeatureView, ViewEvents, Ints]:
        """Of what came live for a view, what is not past, with the positions that go with it."""
        entry = self._entries.get(view.id)
        if entry is None or not entry.guarded or not len(events):
            return view, events, positions
        past = np.zeros(len(events), np.bool_)
        for number in entry.guarded:
            past |= (events.source == number) & (events.position <= entry.cuts[number])
        chosen = np.flatnonzero(~past)
        return view, events.take(chosen), positions[chosen]

    def orders(self, until_us: int | None) -> list[Order]:
        """The pasts that nobody has computed yet; all events before `until_us` were applied."""
        return [
            Order(self._views[name], self.partition, dict(entry.cuts), until_us)
            for name, entry in self._entries.items()
            if entry.placed and not entry.done and name not in self._made
        ]

    def tell(self, name: str, percent: int, waits: str | None = None) -> None:
        """Say how far the computing of a past is, and what it waits for."""
        self._percent[name] = percent
        self._waits.pop(name, None)
        if waits is not None:
            self._waits[name] = waits

    def deliver(self, name: str, made: Made) -> None:
        """Hand over a past; it is merged with the next unit."""
        self._made[name] = made

    def take(self) -> list[tuple[str, Made]]:
        """The pasts to be merged now, into the state that the next `dump` goes with."""
        made, self._made = self._made, {}
        for name, one in made.items():
            entry = self._entries[name]
            entry.done, entry.unfit, entry.complete_from_us = True, one.unfit, one.complete_from_us
            self._merged.add(name)
        return list(made.items())

    def refusals(self, needs: Callable[[], Iterable[tuple[str, frozenset[str]]]]) -> dict[str, str]:
        """Why versions answer nothing yet: those that need a view which is not offered.

        `needs()`: versions, and the views of each.
        """
        held = self.held
        if not held:
            return {}
        return {
            name: "view_backfilling: " + self.reason(min(held & views))
            for name, views in needs()
            if held & views
        }

    def reason(self, name: str) -> str:
        """Why a held view can not be asked."""
        return f"view {name} is being computed from past events: {self._done(name)}%"

    def shown(self, name: str) -> Shown:
        """What is told of a view."""
        entry = self._entries.get(name, Entry(done=True))
        state = "offered"
        if name in self.held:
            state = "committing" if entry.done else "backfilling"
        return Shown(
            state,
            100 if entry.done else self._done(name),
            self._waits.get(name),
            entry.cuts,
            entry.unfit,
            entry.complete_from_us,
        )

    def _done(self, name: str) -> int:
        return self._percent.get(name, 0)
