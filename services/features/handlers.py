"""The two processors of features: re-keying events, and joining vectors into requests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from causemesh.catalogue import Catalogue
from causemesh.checkpoints import Encode
from causemesh.clock import Clock
from causemesh.faultpoints import Point, reach
from causemesh.runner import Batch, Emission, Outgoing
from services.features.backfill.book import Backfills, Ends, Positions
from services.features.domain.definitions import FeatureView
from services.features.domain.events import Ints, ViewEvents, readable_events
from services.features.domain.models import (
    UNRESOLVED,
    ModelBook,
    full_vectors,
    named_numbers,
    named_values,
)
from services.features.domain.snapshots import pack, unpack_blobs
from services.features.domain.state import PartitionState
from services.features.domain.vectors import row_bytes
from services.features.lateness import Missed, missed_records
from services.features.plan import (
    REQUESTS,
    ROLLOUTS,
    VERSIONS,
    Plan,
    event_frame,
    tasks_topic,
)
from services.features.publishing import VectorPublisher
from services.features.rekeying import INPUTS, inputs_of, unpacked

_EVICT_UNITS = 50
_FEW = 128  # so few rows cost less one by one than column operations do (measured)
_INSTANTS = {
    "occurred_at": "occurred_at_us",
    "features_as_of": "as_of_us",
    "expires_at": "expires_us",
}
# What a view sees of a batch, with the positions of the records in the batch.
_Read = tuple[FeatureView, ViewEvents, Ints]
Count = Callable[[str, str, int], None]
"""Adds a number to the metric of a kind and of a view."""


class Rekey:
    """Feeds views that are keyed by another entity than their event."""

    takes_bad_rows = False
    stateful = False

    def __init__(self, views: Sequence[FeatureView]) -> None:
        self._views = [view for view in views if view.placement == "rekeyed"]

    async def process(
        self, batches: Sequence[Batch], watermark_us: int, transaction: Any
    ) -> Emission:
        """See `Processor.process`."""
        found = [(batch, *self._read(batch)) for batch in batches]
        outgoing = [inputs_of(batch, events) for batch, events, _ in found]
        return Emission(outgoing, refused=[(batch, bad) for batch, _, bad in found if bad])

    def _read(self, batch: Batch) -> tuple[list[tuple[FeatureView, ViewEvents]], dict[int, str]]:
        frame = event_frame(batch)
        views = [view for view in self._views if f"events.{view.event_type}" == batch.topic]
        return _read(views, frame)

    def snapshot(self) -> bytes | None:
        """No state."""
        return None

    def restore(self, state: bytes | None) -> None:
        """No state."""


def _read(
    views: Sequence[FeatureView], frame: pl.DataFrame
) -> tuple[list[tuple[FeatureView, ViewEvents]], dict[int, str]]:
    """What each view sees, and the rows that one or more can't take, with all their reasons."""
    found = []
    refused: dict[int, list[str]] = {}
    for view in views:
        events, bad = readable_events(view, frame)
        found.append((view, events))
        for row, reason in bad.items():
            refused.setdefault(row, []).append(reason)
    return found, {row: "; ".join(reasons) for row, reasons in refused.items()}


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
        self._by_id = {view.id: view for view in plan.views}
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
                self.state.add_requests(self._requests(batch))
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

    def _add(self, batch: Batch, events: Sequence[_Read]) -> list[Outgoing]:
        """Take what was read of a batch; returns what came too late, as records."""
        self._publisher.heard(batch)
        missed = []
        for view, found, positions in events:
            late = self.state.add_view_events(view.id, found)
            if len(late):
                number = self._plan.views.index(view)
                missed.append(Missed(view, number, found.take(late), positions[late]))
                self._count("events_missed", view.id, len(late))
        until_us = self.state.aligner.applied_until_us
        return [missed_records(batch, missed, until_us)] if missed and until_us is not None else []

    def _read(self, batch: Batch) -> tuple[list[_Read], dict[int, str]]:
        if batch.topic == INPUTS:
            return self._inputs(batch), {}
        frame = event_frame(batch)
        views = [
            view
            for view in self._plan.views
            if f"events.{view.event_type}" == batch.topic
            and (
                view.placement == "broadcast"
                or (view.placement == "partitioned" and batch.partition == self.partition)
            )
        ]
        found, bad = _read(views, frame)
        since = self.backfills.since_the_cut
        return [since(view, events, events.position) for view, events in found], bad

    def _inputs(self, batch: Batch) -> list[_Read]:
        """View inputs by view and by the partition of events they came from, which breaks ties."""
        found = []
        frame = batch.frame.with_columns(
            batch.frame["cause"].struct.field("partition").alias("number"),
            pl.Series("at", batch.positions),
        )
        for (name, number), part in frame.group_by("view", "number", maintain_order=True):
            view = self._by_id.get(str(name))
            if view is not None:  # inputs of a view that is no longer declared
                events = unpacked(view, part, int(str(number)))
                found.append(self.backfills.since_the_cut(view, events, part["at"].to_numpy()))
        return found

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

    def _requests(self, batch: Batch) -> pl.DataFrame:
        """Requests as the aligner takes them, resolved to a version, their inputs packed."""
        asked = batch.frame
        # Columns, not expressions: a live request comes alone, and pays for each expression.
        frame = pl.DataFrame(
            [
                asked["event_id"].alias("request_id"),
                asked["tenant_id"],
                asked["occurred_at"].cast(pl.Int64).alias("occurred_at_us"),
                asked["model"],
                asked["version"],
                asked["mode"],
                asked["expires_at"].cast(pl.Int64).alias("expires_us"),
                pl.Series("source", np.full(asked.height, batch.partition, dtype=np.int64)),
                pl.Series("position", batch.positions),
                pl.Series("key", [batch.raw.keys[row] for row in batch.rows], dtype=pl.Binary),
            ]
        )
        self.book.held = self.backfills.refusals(self._needs)
        resolved = self.book.resolve(frame)
        entities = named_values(asked["entities"], self._entities, pl.String)
        packed = self._packed_inputs(resolved["signature"], asked["inputs"])
        kept = [column for column in frame.get_columns() if column.name != "version"]
        more = [*resolved.get_columns(), *entities.get_columns(), packed.alias("inputs")]
        return pl.DataFrame([*kept, *more])

    def _needs(self) -> Iterator[tuple[str, frozenset[str]]]:
        """The versions that can be served, and the views that each needs."""
        for one in self.book.signatures.values():
            if one.name not in self.book.broken:
                yield one.name, self.state.store.views_of(one.view_features)

    def _packed_inputs(self, signatures: pl.Series, inputs: pl.Series) -> pl.Series:
        if len(signatures) <= _FEW:
            asked = zip(signatures.to_list(), inputs.to_list(), strict=True)
            rows = [self._packed_row(name, row) for name, row in asked]
            return pl.Series("inputs", rows, dtype=pl.Binary)
        packed = np.full(len(signatures), b"", dtype=object)
        for name in sorted(set(signatures.to_list()) - {UNRESOLVED}):
            at = np.flatnonzero((signatures == name).to_numpy())
            mine = inputs if len(at) == len(inputs) else inputs[at]
            packed[at] = row_bytes(named_numbers(mine, self.book.signatures[name].inputs))
        return pl.Series("inputs", packed.tolist(), dtype=pl.Binary)

    def _packed_row(self, signature: str, inputs: Sequence[Mapping[str, Any]] | None) -> bytes:
        if signature == UNRESOLVED:
            return b""
        given = {pair["name"]: pair["value"] for pair in inputs or ()}
        values = [given.get(name) for name in self.book.signatures[signature].inputs]
        return np.array(values, dtype=np.float64).astype("<f4").tobytes()  # None becomes NaN

    def _tasks(self) -> list[Outgoing]:
        ready = self.state.ready()
        if ready is None:
            return []
        lane_of = {name: one.lane for name, one in self.book.signatures.items()}
        lanes = pl.Series([lane_of.get(name, "realtime") for name in ready["signature"].to_list()])
        names = sorted(set(lanes))
        if len(names) == 1:
            return [self._lane_tasks(names[0], ready)]
        return [self._lane_tasks(lane, ready.filter(lanes == lane)) for lane in names]

    def _lane_tasks(self, lane: str, ready: pl.DataFrame) -> Outgoing:
        vectors = np.full(ready.height, b"", dtype=object)
        failures = np.array(ready["failure"].to_list(), dtype=object)
        for name in sorted(set(ready["signature"].to_list()) - {UNRESOLVED}):
            at = np.flatnonzero((ready["signature"] == name).to_numpy())
            part = ready if len(at) == ready.height else ready[at]
            vectors[at], missing = _completed(self.book, name, part)
            failures[at] = missing
        instants = {
            name: ready[of].cast(pl.Datetime("us", "UTC")).alias(name)
            for name, of in _INSTANTS.items()
        }
        frame = pl.DataFrame(
            [
                ready["tenant_id"],
                instants["occurred_at"],
                ready["request_id"],
                ready["model"],
                ready["version"],
                pl.Series("vector", vectors.tolist(), dtype=pl.Binary),
                instants["features_as_of"],
                pl.Series("failure", failures.tolist(), dtype=pl.String),
                instants["expires_at"],
            ]
        )
        positions = ready["position"].to_numpy()
        return Outgoing(
            tasks_topic(lane), frame, ready["key"].to_list(), REQUESTS, self.partition, positions
        )

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


def _completed(
    book: ModelBook, name: str, part: pl.DataFrame
) -> tuple[np.ndarray[Any, Any], list[str | None]]:
    views, inputs = part["vector"].to_list(), part["inputs"].to_list()
    vectors, missing = full_vectors(book.signatures[name], views, inputs, book.transforms)
    whole = np.empty(len(vectors), dtype=object)
    whole[:] = vectors
    return whole, missing
