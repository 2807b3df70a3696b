"""Everything one partition knows: the state of its views and the buffers of event time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import polars as pl

from services.features.domain.align import DEFAULT_SLICE_US, Advanced, Aligner, ApplyOn
from services.features.domain.definitions import FeatureView
from services.features.domain.engine import ViewState
from services.features.domain.events import Ints, ViewEvents
from services.features.domain.feature_store import FeatureStore
from services.features.domain.snapshots import pack, unpack_blobs

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

    def declare(self, signature: str, feature_names: Sequence[str]) -> None:
        """Say which features the requests of a signature ask for."""
        self.aligner.declare(signature, feature_names)

    def add_events(self, event_type: str, frame: pl.DataFrame) -> None:
        """Take events for every view of their type: all of the frame, or (Poison) none of it.

        Columns: tenant_id, occurred_at_us, source, position and those that the views read.
        """
        for name, events in self.store.read(event_type, frame).items():
            self.aligner.add_events(name, events)

    def add_view_events(self, view_name: str, events: ViewEvents) -> Ints:
        """Take events that were read for one view elsewhere; returns which came too late."""
        return self.aligner.add_events(view_name, events)

    def take_over(self, view_name: str, past: ViewState, ahead: ViewEvents) -> None:
        """Complete a view that began in the middle by the past it has not seen.

        `past` is the state over the earlier events, but for `ahead`: those that are not to be
        applied yet. It must not be used any more afterwards.
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
