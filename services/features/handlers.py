"""The joining processor: vectors into requests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import polars as pl

from causemesh.catalogue import Catalogue
from causemesh.checkpoints import Encode
from causemesh.clock import Clock
from causemesh.faultpoints import Point, reach
from causemesh.runner import Batch, Emission, Outgoing
from services.features.backfill.book import Backfills, Ends, Positions
from services.features.domain.models import UNRESOLVED, ModelBook
from services.features.domain.snapshots import pack, unpack_blobs
from services.features.domain.state import PartitionState
from services.features.lateness import Late, late_records, tells
from services.features.plan import REQUESTS, ROLLOUTS, VERSIONS, Plan
from services.features.publishing import VectorPublisher
from services.features.reading import JoinReader, Placed
from services.features.requests import requests_of
from services.features.tasks import tasks_of

_EVICT_UNITS = 50
Count = Callable[[str, str, int], None]
"""Adds a number to the metric of a kind and of a view."""


class Join:
    """Joins the vector into each request of one partition."""

    takes_bad_rows = False
    stateful = True

    def __init__(
        self,
        plan: Plan,
        catalogue: Catalogue,
        partition: int,
        *,
        slice_us: int,
        clock: Clock,
        publish_seconds: float | None,
        count: Count = lambda kind, what, number: None,
        positions: Positions = dict,
        ends: Ends | None = None,
    ) -> None:
        self._count = count
        self._positions = positions
        self._ends = ends
        self._catalogue = catalogue
        self._plan = plan
        self.partition = partition
        self._slice_us = slice_us
        self._partitions = catalogue.topic(REQUESTS).partitions
        self._reader = JoinReader(plan, partition)
        self._clock = clock
        self._publish_seconds = publish_seconds
        self._units = 0
        self.evicted: Counter[str] = Counter()  # entities by view, since this worker began
        self._entities = sorted({name for view in plan.views for name in view.request_entity})
        self.restore(None)

    def restore(self, state: bytes | None) -> None:
        """See `Processor.restore`; after a restart every vector of the partition is published."""
        self.state = PartitionState(self._plan.views, slice_us=self._slice_us)
        self.state.declare(UNRESOLVED, ())
        self.book = ModelBook(self.state.store.known_names, self._plan.transforms)
        self.backfills = Backfills(self._plan.views, self._catalogue, self.partition)
        self._books_read = self._books()
        self._replaced = False
        self._publisher = VectorPublisher(
            self.state.store, self.partition, self._partitions, self._clock, self._publish_seconds
        )
        if state is not None:
            blobs = unpack_blobs(state, "features")
            self._books_read = blobs
            self._load_models()
            self._resume(self.state.restore(blobs["state"]))
        self._stored = self._noted = self._known()

    def _load_models(self) -> None:
        self.book.load(self._books_read["models"])
        for signature in self.book.signatures.values():
            if signature.name not in self.book.broken:
                self.state.declare(signature.name, signature.view_features)

    def snapshot(self) -> bytes | None:
        """See `Processor.snapshot`."""
        self._noted = self._known()
        return _packed(self._books(), self.state.snapshot)()

    def pieces(self) -> Sequence[str]:
        """See `Pieced.pieces`."""
        return self.state.pieces()

    def piece(self, name: str) -> Encode:
        """See `Pieced.piece`."""
        return _packed(self._books(), self.state.piece(name))

    def track(self) -> None:
        """See `Pieced.track`."""
        self.state.track()
        self._replaced = False

    def replaced(self) -> bool:
        """See `Pieced.replaced`: so is the state of a view that was given its past."""
        return self._replaced

    def delta(self) -> Encode:
        """See `Pieced.delta`."""
        self._noted = self._known()
        return _packed(self._books(), self.state.changes())

    def apply(self, body: bytes) -> None:
        """See `Pieced.apply`."""
        self._books_read = unpack_blobs(body, "features")
        self.state.apply_part(self._books_read["state"])

    def applied(self) -> None:
        """See `Pieced.applied`."""
        new = self.state.settle()
        self._load_models()
        self._resume(new)
        self._stored = self._noted = self._known()

    def committed(self) -> None:
        """See `Pieced.committed`."""
        self._stored = self._noted
        self._publish_all(self.backfills.committed())

    def _books(self) -> dict[str, bytes]:
        """What is kept beside the state."""
        return {"models": self.book.dump(), "backfills": self.backfills.dump()}

    def _resume(self, new: Iterable[str]) -> None:
        """Go on from a saved state that knows nothing of the `new` views."""
        self.backfills.load(self._books_read.get("backfills", b"{}"))
        self.backfills.begin(new, self._positions())
        self._publish_all(self.state.store.views)

    async def process(
        self, batches: Sequence[Batch], watermark_us: int, transaction: Any
    ) -> Emission:
        """See `Processor.process`: everything is read before any is taken."""
        if self._ends is not None:
            await self.backfills.place(self._ends)
        read = [
            (batch, *self._read(batch))
            for batch in batches
            if batch.topic not in (REQUESTS, VERSIONS, ROLLOUTS)
        ]
        for batch in batches:
            self._learn(batch)
        merged = self._merge_pasts()
        late = [part for batch, events, _ in read for part in self._add(batch, events)]
        for batch in batches:
            if batch.topic == REQUESTS:
                self.book.held = self.backfills.refusals(self._needs)
                self.state.add_requests(requests_of(batch, self.book, self._entities))
        advanced = self.state.advance(watermark_us)
        self._evict_sometimes()
        self._publisher.touch(self.backfills.offered(advanced.touched))
        outgoing = [*self._tasks(), *late, *self._publisher.due(watermark_us)]
        floor = self.state.unemitted_floor_us()
        promise = watermark_us if floor is None else min(watermark_us, floor)
        refused = [(batch, bad) for batch, _, bad in read if bad]
        return Emission(outgoing, {REQUESTS: promise}, refused, merged)

    def _merge_pasts(self) -> bool:
        """Complete the views whose past has been computed; whether there were any."""
        made = self.backfills.take()
        for name, past in made:
            self.state.take_over(name, past.state, past.ahead)
        if made:
            self._replaced = True
            reach(Point.BACKFILL_MERGED)
        return bool(made)

    def _publish_all(self, views: Iterable[str]) -> None:
        """Have every entity of these views published: nobody knows what was sent."""
        rows = {name: self.state.store.views[name].index.rows for name in views}
        self._publisher.touch(self.backfills.offered(rows))

    def _add(self, batch: Batch, events: Sequence[Placed]) -> list[Outgoing]:
        """Take what was read of a batch; returns what came late, as records."""
        self._publisher.heard(batch)
        late = []
        for view, found, positions in events:
            behind = self.state.add_view_events(view.id, found)
            if len(behind) and tells(self.partition, batch, self._partitions):
                late.append(Late(view, found, positions, behind))
        return [self._told(batch, late)] if late else []

    def _told(self, batch: Batch, late: Sequence[Late]) -> Outgoing:
        """The records of late events, which are counted by view and by what came of them."""
        for one in late:
            taken = int(one.behind.taken.sum())
            for kind, number in (
                ("events_missed", len(one.behind) - taken),
                ("events_taken_late", taken),
            ):
                if number:
                    self._count(kind, one.view.id, number)
        until_us = self.state.aligner.applied_until_us
        assert until_us is not None, "before any time was applied no event is late"
        return late_records(batch, late, until_us)

    def _read(self, batch: Batch) -> tuple[list[Placed], dict[int, str]]:
        found, bad = self._reader.read(batch)
        return [self.backfills.since_the_cut(*one) for one in found], bad

    def _learn(self, batch: Batch) -> None:
        if batch.topic == VERSIONS:
            for signature in self.book.add_versions(batch.frame.to_dicts()):
                self.state.declare(signature.name, signature.view_features)
        elif batch.topic == ROLLOUTS:
            instants = pl.col("schedule").list.eval(
                pl.struct(
                    pl.element().struct.field("version"),
                    pl.element().struct.field("effective_at").to_physical(),
                )
            )
            self.book.add_rollouts(batch.frame.with_columns(instants).to_dicts())

    def _needs(self) -> Iterator[tuple[str, frozenset[str]]]:
        """The versions that can be served, and the views that each needs."""
        for one in self.book.signatures.values():
            if one.name not in self.book.broken:
                yield one.name, self.state.store.views_of(one.view_features)

    def _tasks(self) -> list[Outgoing]:
        ready = self.state.ready()
        return [] if ready is None else tasks_of(ready, self.book, self.partition)

    def _evict_sometimes(self) -> None:
        self._units += 1
        if self._units % _EVICT_UNITS == 0:
            for view, number in self.state.evict_by_view().items():
                self.evicted[view] += number
                self._count("entities_evicted", view, number)

    def models(self) -> Mapping[str, Any]:
        """What this partition knows of models and will not forget, for the API.

        Only what is committed: who waits for a schedule before it sends requests must find it known
        after a crash too, when the requests may be read before the schedule.
        """
        return self._stored

    def _known(self) -> Mapping[str, Any]:
        return {
            "versions": sorted(self.book.signatures),
            "broken": dict(self.book.broken),
            "schedules": {
                name: [
                    {"version": version, "effective_us": at_us}
                    for version, at_us in zip(one.versions, one.effective_us, strict=True)
                ]
                for name, one in self.book.rollouts.items()
            },
        }


def _packed(books: Mapping[str, bytes], state: Encode) -> Encode:
    return lambda: pack({"kind": "features"}, {}, {**books, "state": state()})
