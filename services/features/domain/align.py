"""Align requests with events on event time: compute by event time, emit by position.

A replay request of the slice that starts at `s` is answered when the watermark has reached `s`:
by then every event before `s` is here. State is applied up to the start of the watermark's slice
and no further, so a later request of that slice still finds it as it must be. An event that comes
behind that start, and that its view still takes, waits for the next slice: requests that are as of
an earlier time, or of this one, don't see it, whether they were answered before it came or after.
So it is known who saw it, from the time up to which events had been applied. Answers are held until
every earlier position of their source was answered too, because the next consumer drops what comes
out of order as a replay. What waits, is held or not applied yet is part of the snapshot.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import polars as pl

from causemesh.errors import Misdeclared, Poison
from services.features.domain.aggregates import RowEvents
from services.features.domain.buffers import append, joined, packed, split, unpacked
from services.features.domain.events import Ints, ViewEvents, int64
from services.features.domain.feature_store import FeatureStore
from services.features.domain.late import Behind, behind_of
from services.features.domain.snapshots import pack, unpack, unpack_blobs

ApplyOn = Literal["watermark", "arrival"]
# Of a part of a checkpoint: all that waits; what was added; that, and less what was applied.
_Form = Literal["whole", "added", "advanced"]
DEFAULT_SLICE_US = 60_000_000
_PENDING = "pending."
_REQUIRED = ("source", "position", "occurred_at_us", "mode", "signature", "tenant_id")


@dataclass(frozen=True)
class Advanced:
    """What one `advance` did.

    answered: requests; applied: events; late_events: those that came behind what was applied
    already; dropped_events: those of them that a view did not take, or no tile; late_requests:
    replay requests that came behind it, whose answers may hold events after their slice; touched:
    by view, the rows whose state changed.
    """

    answered: int = 0
    applied: int = 0
    late_events: int = 0
    dropped_events: int = 0
    late_requests: int = 0
    touched: dict[str, Ints] = field(default_factory=dict)


class Aligner:
    """The event-time buffers of one partition.

    `apply_on` "watermark" serves replay and live requests: a live one sees the applied state and
    the buffered events up to its own time. "arrival" applies events at once, for a partition with
    live requests only, where the buffers of a slice would be large.
    """

    def __init__(
        self,
        store: FeatureStore,
        *,
        slice_us: int = DEFAULT_SLICE_US,
        apply_on: ApplyOn = "watermark",
    ) -> None:
        self._store = store
        self._slice_us = slice_us
        self._apply_on = apply_on
        self._signatures: dict[str, tuple[str, ...]] = {}
        self._boundary_us: int | None = None
        self._pending: dict[str, list[RowEvents]] = {name: [] for name in store.views}
        self._late_events = 0
        self._late_requests = 0
        self._dropped_events = 0
        self._applied = 0
        self._touched: dict[str, list[Ints]] = {}
        self._waiting: pl.DataFrame | None = None
        self._held: pl.DataFrame | None = None
        # events taken since the last checkpoint, by view; None where nobody asks
        self._unsaved: dict[str, list[RowEvents]] | None = None
        self._advanced = False  # since the last checkpoint

    def declare(self, signature: str, feature_names: Sequence[str]) -> None:
        """Say which features the requests of a signature ask for; Misdeclared if one is unknown.

        A signature never changes its meaning: declaring it again with other features is refused,
        and so is a name without version that means another version than it did.
        """
        pinned = self._store.pinned(feature_names)
        known = self._signatures.setdefault(signature, pinned)
        if known != pinned:
            raise Misdeclared(f"signature {signature!r} is already declared with other features")

    def add_events(self, view_name: str, events: ViewEvents) -> Behind:
        """Take events of one view (`read_events` made them); returns those that came late."""
        if view_name not in self._pending:
            raise Misdeclared(f"events for the unknown feature view {view_name!r}")
        view = self._store.views[view_name].view
        behind = behind_of(view, self._boundary_us, events.occurred_at_us)
        missed = behind.missed
        if len(missed):
            events = events.take(np.delete(np.arange(len(events)), missed))
        if len(events):
            self._take(view_name, self._store.views[view_name].encode(events))
        self._late_events += len(behind)
        self._dropped_events += len(missed)
        return behind

    def _take(self, view_name: str, coded: RowEvents) -> None:
        if self._apply_on == "arrival":
            self._apply(view_name, coded, None)
        else:
            append(self._pending[view_name], coded)
            if self._unsaved is not None:
                self._unsaved[view_name].append(coded)

    def forget(self, view_name: str) -> None:
        """Drop the events of a view that wait to be applied."""
        self._pending[view_name] = []

    def take_over(self, view_name: str, rows: Ints, ahead: ViewEvents) -> None:
        """Go on after the store put another state of a view in the place of the one it had.

        `rows`: the row there of each row of the former state, by its number. `ahead` are events
        that the new state has not seen and that are taken whatever their time.
        """
        parts = self._pending[view_name]
        self._pending[view_name] = [replace(part, rows=rows[part.rows]) for part in parts]
        if view_name in self._touched:
            touched = self._touched[view_name]
            self._touched[view_name] = [np.unique(rows[part]) for part in touched]
        if len(ahead):
            self._take_ahead(view_name, self._store.views[view_name].encode(ahead))

    def _take_ahead(self, view_name: str, coded: RowEvents) -> None:
        """Of these nobody is to be answered without: what is before the boundary does not wait."""
        if self._boundary_us is not None:
            due, left = split([coded], self._boundary_us)
            for part in due:
                self._apply(view_name, part, None)
            coded = left[0] if left else RowEvents.none(len(coded.values))
        if len(coded):
            self._take(view_name, coded)

    def add_requests(self, frame: pl.DataFrame) -> None:
        """Take requests; live ones are answered at once, all of them come out of `ready`.

        Columns: source, position, occurred_at_us, mode ("live" or "replay"), signature, tenant_id,
        the entities (null where there is none), and a payload that is carried along. Raises
        Poison for rows that cannot be answered, before any row is taken.
        """
        self._check(frame)
        if not frame.height:
            return
        time = int64(frame, "occurred_at_us")
        live = (frame["mode"] == "live").to_numpy()
        as_of_us = np.where(live, time + 1, time // self._slice_us * self._slice_us)
        frame = frame.hstack([pl.Series("as_of_us", as_of_us)])
        if self._boundary_us is not None:
            self._late_requests += int((~live & (as_of_us < self._boundary_us)).sum())
        if not live.all():
            self._waiting = joined(self._waiting, frame.filter(~live) if live.any() else frame)
        if live.any():
            self._answer(frame if live.all() else frame.filter(live), self._pending)

    def advance(self, watermark_us: int) -> Advanced:
        """Answer and apply what the watermark (the least of all sources) allows."""
        before_us = self._boundary_us
        boundary_us = watermark_us // self._slice_us * self._slice_us
        due: dict[str, list[RowEvents]] = {name: [] for name in self._pending}
        answered = 0
        if before_us is not None:
            # what came behind the boundary waits, though it lies before these
            answered = self._answer_due(due, before_us)
        if before_us is None or boundary_us > before_us:
            self._boundary_us = boundary_us
            due = {name: self._take_due(name, boundary_us) for name in self._pending}
            answered += self._answer_due(due, boundary_us)
        if self._unsaved is not None and any(due.values()):
            self._unsaved = {name: self._still(parts) for name, parts in self._unsaved.items()}
            self._advanced = True
        for name, parts in due.items():
            columns = len(self._store.views[name].view.columns)
            events = RowEvents.concatenate(parts) if parts else RowEvents.none(columns)
            self._apply(name, events, self._boundary_us)
        return self._account(answered)

    def ready(self) -> pl.DataFrame | None:
        """Take the answered requests that may be emitted, by source and position; None if none.

        The frame has the columns given plus as_of_us and `vector` (bytes, float32 little-endian).
        """
        held = self._held
        if held is None:
            return None
        if self._waiting is None:
            self._held, ready = None, held
        else:
            first = self._waiting.group_by("source").agg(pl.col("position").min().alias("__first"))
            marked = held.join(first, on="source", how="left", maintain_order="left")
            free = marked["__first"].is_null() | (marked["position"] < marked["__first"])
            ready = held.filter(free)
            self._held = held.filter(~free) if ready.height < held.height else None
        if ready.height < 2:
            return ready if ready.height else None
        return ready.sort("source", "position")

    def unemitted_floor_us(self) -> int | None:
        """The least event time of any request that was not emitted: no watermark may pass it."""
        frames = [frame for frame in (self._waiting, self._held) if frame is not None]
        floors = [int(frame["occurred_at_us"].to_numpy().min()) for frame in frames]
        return min(floors, default=None)

    @property
    def applied_until_us(self) -> int | None:
        """All events before this time were applied, but for late ones; None before any."""
        return self._boundary_us

    @property
    def answered_until_us(self) -> int | None:
        """No replay answer still to come is as of an earlier time; None before any watermark."""
        if self._boundary_us is None or self._waiting is None:
            return self._boundary_us
        return min(self._boundary_us, int(self._waiting["as_of_us"].to_numpy().min()))

    def pending_rows(self, view_name: str) -> Ints:
        """The entity rows of events that wait to be applied."""
        parts = [part.rows for part in self._pending[view_name]]
        return np.unique(np.concatenate([np.empty(0, np.int64), *parts]))

    def snapshot(self) -> bytes:
        """The buffers as bytes; the states of the views are saved apart."""
        return self.all_part()()

    def track(self) -> None:
        """Begin to note what is taken."""
        self._unsaved = {name: [] for name in self._pending}
        self._advanced = False

    def all_part(self) -> Callable[[], bytes]:
        """The buffers; the bytes can be made later, in another thread."""
        return self._part(self._pending, "whole")

    def changes_part(self) -> Callable[[], bytes]:
        """The buffers, but of the events that wait only those taken since the last call."""
        assert self._unsaved is not None
        part = self._part(self._unsaved, "advanced" if self._advanced else "added")
        self.track()
        return part

    def apply_part(self, body: bytes) -> None:
        """Take over a part, after those before it; Misdeclared if settings differ."""
        before = self._pending
        form = self._load(body)
        for name, parts in self._pending.items():
            if form == "added":
                self._pending[name] = [*before[name], *parts]
            elif form == "advanced":
                self._pending[name] = [*self._still(before[name]), *parts]

    def _still(self, parts: list[RowEvents]) -> list[RowEvents]:
        """Of events that waited to be applied, those that wait on after `advance`."""
        assert self._boundary_us is not None
        return split(parts, self._boundary_us)[1]

    def _part(self, pending: Mapping[str, Sequence[RowEvents]], form: _Form) -> Callable[[], bytes]:
        header = {
            "kind": "aligner",
            "form": form,
            "slice_us": self._slice_us,
            "apply_on": self._apply_on,
            "boundary_us": self._boundary_us,
            "signatures": dict(self._signatures),
            "late_events": self._late_events,
            "late_requests": self._late_requests,
        }
        named = {"waiting": self._waiting, "held": self._held}
        frames = {name: frame for name, frame in named.items() if frame is not None}
        taken = {name: list(parts) for name, parts in pending.items() if parts}

        def encode() -> bytes:
            blobs = {_PENDING + name: packed(parts) for name, parts in taken.items()}
            return pack(header, frames, blobs)

        return encode

    def restore(self, snapshot: bytes) -> None:
        """Take over saved buffers, after the views' states; Misdeclared if settings differ."""
        self._load(snapshot)

    def _load(self, saved: bytes) -> _Form:
        """Take over a part, in place of what there is; returns its form."""
        header, frames = unpack(saved, "aligner")
        blobs = unpack_blobs(saved, "aligner")
        for setting, value in (("slice_us", self._slice_us), ("apply_on", self._apply_on)):
            if header[setting] != value:
                raise Misdeclared(f"{setting} is {value!r} but the state has {header[setting]!r}")
        for signature, feature_names in header["signatures"].items():
            self.declare(signature, feature_names)
        self._boundary_us = header["boundary_us"]
        self._late_events, self._late_requests = header["late_events"], header["late_requests"]
        self._waiting, self._held = frames.get("waiting"), frames.get("held")
        events = {name: blobs.get(_PENDING + name) for name in self._store.views}
        self._pending = {
            name: [] if packed is None else [unpacked(packed)] for name, packed in events.items()
        }
        form: _Form = header["form"]
        return form

    def _check(self, frame: pl.DataFrame) -> None:
        missing = [name for name in _REQUIRED if name not in frame.columns]
        if missing:
            raise Misdeclared(f"requests lack the columns {missing}")
        modes = {"live"} if self._apply_on == "arrival" else {"live", "replay"}
        bad: dict[int, str] = {}
        for name in ("source", "position", "occurred_at_us"):
            if frame[name].null_count():
                bad |= dict.fromkeys(frame[name].is_null().arg_true().to_list(), f"{name} is null")
        allowed: tuple[tuple[str, Collection[str]], ...] = (
            ("mode", modes),
            ("signature", self._signatures),
        )
        for name, values in allowed:
            if not set(frame[name].to_list()) <= set(values):
                for row, value in enumerate(frame[name]):
                    if value not in values:
                        bad[row] = f"{name} {value!r} is not declared or not served here"
        if bad:
            raise Poison(bad)

    def _take_due(self, name: str, boundary_us: int) -> list[RowEvents]:
        """Remove and return the pending events before the boundary."""
        taken, self._pending[name] = split(self._pending[name], boundary_us)
        return taken

    def _answer_due(self, due: dict[str, list[RowEvents]], boundary_us: int) -> int:
        if self._waiting is None:
            return 0
        now = self._waiting["as_of_us"] <= boundary_us
        if not now.any():
            return 0
        asked, left = self._waiting.filter(now), self._waiting.filter(~now)
        self._waiting = left if left.height else None
        self._answer(asked, due)
        return asked.height

    def _answer(self, requests: pl.DataFrame, chunk: dict[str, list[RowEvents]]) -> None:
        vector = self._store.answer_signatures(
            requests, self._signatures, requests["as_of_us"].to_numpy(), chunk
        )
        self._held = joined(self._held, requests.hstack([vector]))

    def _apply(self, name: str, events: RowEvents, until_us: int | None) -> None:
        done = self._store.views[name].apply(events, until_us)
        self._applied += len(events)
        self._dropped_events += done.late
        if len(done.touched):
            self._touched.setdefault(name, []).append(done.touched)

    def _account(self, answered: int) -> Advanced:
        """Report, and start counting again."""
        touched = {
            name: rows[0] if len(rows) == 1 else np.unique(np.concatenate(rows))
            for name, rows in self._touched.items()
        }
        report = Advanced(
            answered,
            self._applied,
            self._late_events,
            self._dropped_events,
            self._late_requests,
            touched,
        )
        self._applied = self._late_events = self._dropped_events = self._late_requests = 0
        self._touched = {}
        return report
