"""Everything one partition knows: the state of its views and the buffers of event time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import polars as pl

from services.features.domain.align import DEFAULT_SLICE_US, Advanced, Aligner, ApplyOn
from services.features.domain.definitions import FeatureView
from services.features.domain.engine import ViewState
from services.features.domain.events import ViewEvents
from services.features.domain.feature_store import FeatureStore
from services.features.domain.late import Behind
from services.features.domain.parts import (
    Encode,
    apply_part,
    changes_part,
    piece_rows,
    rows_part,
    track,
)
from services.features.domain.snapshots import pack, unpack_all, unpack_blobs

_ALIGNER = "aligner"
_VIEW = "view."


class PartitionState:
    """One partition of the feature service, as a value: in go events, requests and watermarks.

    A handler adds what a batch brought, advances to its watermark, emits what is ready and may
    pass on the watermark up to `unemitted_floor_us`. A snapshot, taken where a batch ends, holds
    all of it; the input positions are saved beside it by the caller.
    """

    def __init__(
        self,
        views: Iterable[FeatureView],
        *,
        slice_us: int = DEFAULT_SLICE_US,
        apply_on: ApplyOn = "watermark",
    ) -> None:
        self.store = FeatureStore(views)
        self.aligner = Aligner(self.store, slice_us=slice_us, apply_on=apply_on)
        self._said: frozenset[str] = frozenset(self.store.views)

    def declare(self, signature: str, feature_names: Sequence[str]) -> None:
        """Say which features the requests of a signature ask for."""
        self.aligner.declare(signature, feature_names)

    def add_events(self, event_type: str, frame: pl.DataFrame) -> None:
        """Take events for every view of their type: all of the frame, or (Poison) none of it.

        Columns: tenant_id, occurred_at_us, source, position and those that the views read.
        """
        for name, events in self.store.read(event_type, frame).items():
            self.aligner.add_events(name, events)

    def add_view_events(self, view_name: str, events: ViewEvents) -> Behind:
        """Take events that were read for one view elsewhere; returns which came late."""
        return self.aligner.add_events(view_name, events)

    def take_over(self, view_name: str, past: ViewState, ahead: ViewEvents) -> None:
        """Complete a view that began in the middle by the past it has not seen.

        `past` is the state over the earlier events, but for `ahead`: those that are not to be
        applied yet. It must not be used any more afterwards. What changed is not noted: call
        `track` before the next `changes`.
        """
        rows = past.merge(self.store.views[view_name])
        self.store.views[view_name] = past
        self.aligner.take_over(view_name, rows, ahead)

    def add_requests(self, frame: pl.DataFrame) -> None:
        """Take requests (see Aligner.add_requests)."""
        self.aligner.add_requests(frame)

    def advance(self, watermark_us: int) -> Advanced:
        """Answer and apply what the watermark allows."""
        return self.aligner.advance(watermark_us)

    def ready(self) -> pl.DataFrame | None:
        """Take the answered requests that may be emitted, in position order."""
        return self.aligner.ready()

    def unemitted_floor_us(self) -> int | None:
        """The least event time of any request not emitted yet; None when there is none."""
        return self.aligner.unemitted_floor_us()

    def evict(self) -> int:
        """Forget entities that no replay answer still to come depends on; returns how many."""
        return sum(self.evict_by_view().values())

    def evict_by_view(self) -> dict[str, int]:
        """The same, counted by view."""
        before_us = self.aligner.answered_until_us
        if before_us is None:
            return {}
        return {
            name: state.evict(before_us, self.aligner.pending_rows(name))
            for name, state in self.store.views.items()
        }

    def memory_bytes(self) -> int:
        """Roughly what the states of the views hold; buffers not included."""
        return self.store.memory_bytes()

    def pieces(self) -> list[str]:
        """The names of the pieces that together are all of it: rows of a view, and the buffers."""
        names = [_ALIGNER]
        for name, state in self.store.views.items():
            rows = piece_rows(state)
            count = -(-state.index.end // rows)
            names += [f"{_VIEW}{name}/{rows}/{number}" for number in range(count)]
        return names

    def piece(self, name: str) -> Encode:
        """All of one piece as it is now; its bytes can be made later, in another thread."""
        if name == _ALIGNER:
            return self._packed({_ALIGNER: self.aligner.all_part()})
        view, count, number = name.removeprefix(_VIEW).rsplit("/", 2)
        first = int(count) * int(number)
        rows = slice(first, first + int(count))
        return self._packed({_VIEW + view: rows_part(self.store.views[view], rows)})

    def track(self) -> None:
        """Begin to note what changes, for the first `changes`."""
        for state in self.store.views.values():
            track(state)
        self.aligner.track()

    def changes(self) -> Encode:
        """What changed since the last call, or since `track`."""
        parts = {_ALIGNER: self.aligner.changes_part()}
        for name, state in self.store.views.items():
            part = changes_part(state)
            if part is not None:
                parts[_VIEW + name] = part
        until_us = {name: one.applied_until_us for name, one in self.store.views.items()}
        return self._packed(parts, {"applied_until_us": until_us})

    def apply_part(self, body: bytes) -> None:
        """Take over a piece or changes, in the order in which they were made. Call `settle` then.

        What is said of views that are no longer declared is left out.
        """
        header, blobs = unpack_all(body, "partition-part")
        self._said = frozenset(header["views"])
        for name, until_us in header["applied_until_us"].items():
            if name in self.store.views:
                self.store.views[name].applied_until_us = until_us
        for name, blob in blobs.items():
            if name == _ALIGNER:
                self.aligner.apply_part(blob)
            elif (view := name.removeprefix(_VIEW)) in self.store.views:
                apply_part(self.store.views[view], blob)

    def settle(self) -> list[str]:
        """All parts were applied; returns the views that the last of them knew nothing of."""
        for state in self.store.views.values():
            state.index.settle()
        new = [name for name in self.store.views if name not in self._said]
        for name in new:  # it may have been declared long ago, and be in some older part
            self.store.views[name] = ViewState(self.store.views[name].view)
            self.aligner.forget(name)
        return new

    def _packed(
        self, parts: Mapping[str, Encode], header: Mapping[str, Any] | None = None
    ) -> Encode:
        told = {"kind": "partition-part", "views": list(self.store.views), "applied_until_us": {}}
        told |= dict(header or {})
        return lambda: pack(told, {}, {name: encode() for name, encode in parts.items()})

    def snapshot(self) -> bytes:
        """State and buffers as bytes."""
        blobs = {_VIEW + name: state.snapshot() for name, state in self.store.views.items()}
        blobs[_ALIGNER] = self.aligner.snapshot()
        return pack({"kind": "partition"}, {}, blobs)

    def restore(self, snapshot: bytes) -> list[str]:
        """Take over a snapshot, into a fresh object; returns the views it had no state for.

        Such a view is new: it starts empty and is right only after its events were replayed.
        Misdeclared when a saved view has changed without a new name.
        """
        blobs = unpack_blobs(snapshot, "partition")
        new = [name for name in self.store.views if _VIEW + name not in blobs]
        for name, state in self.store.views.items():
            if name not in new:
                state.restore(blobs[_VIEW + name])
        self.aligner.restore(blobs[_ALIGNER])
        return new
