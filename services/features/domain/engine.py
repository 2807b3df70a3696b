"""The state of one view in one partition: apply events, answer requests as of a point in time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import polars as pl

from causemesh.errors import Misdeclared
from services.features.domain.aggregates import (
    NEVER,
    RECORD,
    Aggregates,
    RowEvents,
    newest,
    records_of_segments,
    reduce_segments,
    stacked,
    unstacked,
)
from services.features.domain.changes import Touched
from services.features.domain.chunk import Chunk
from services.features.domain.corrections import KeptEvents
from services.features.domain.definitions import FeatureView
from services.features.domain.entities import EntityIndex
from services.features.domain.events import Ints, ViewEvents
from services.features.domain.layout import EVENT, TIME, Layout, layout_of
from services.features.domain.ring import EMPTY, TileRing
from services.features.domain.sketched import BLOCK, ViewSketches
from services.features.domain.snapshots import frame_matrix, matrix_frame, pack, unpack
from services.features.domain.vectors import Primitives, Vectors, vectors
from services.features.domain.windowed import Extents, extents_of, session_ages

Entities = pl.Series | Sequence[str | None]


@dataclass(frozen=True)
class Applied:
    """What an `apply` did: events too old for any tile, and the rows touched, each once, rising."""

    late: int
    touched: Ints


class ViewState:
    """Columnar state of one view. Its rows are stable until an entity is evicted."""

    def __init__(self, view: FeatureView) -> None:
        self.view = view
        self.layout: Layout = layout_of(view)
        self.index = EntityIndex()
        self.ring = TileRing(self.layout, view.tiles)
        self.sketches = ViewSketches(self.layout, self.ring)
        # the newest record of each column, and of the event itself, which eviction goes by
        latests = self.layout.latests
        self._kept = tuple(dict.fromkeys((*latests, EVENT))) if latests else ()
        self._latest = np.empty((0, len(self._kept), RECORD), np.int64)
        # only where the view takes corrections
        self._kept_events = KeptEvents(view) if view.corrects or view.retracts else None
        self.applied_until_us: int | None = None
        # of `_latest`: rows that changed, and rows that were cleared; None where nobody asks
        self.touched: Touched | None = None
        self.cleared: Touched | None = None
        self.ensure()

    @property
    def entities(self) -> list[str]:
        """The keys of all entities with state."""
        return self.index.keys

    @property
    def latest(self) -> Ints:
        """The newest records of every row: int64 [rows, columns, RECORD]."""
        return self._latest

    @property
    def kept_events(self) -> KeptEvents | None:
        """What is kept for corrections, where the view takes some."""
        return self._kept_events

    def encode(self, events: ViewEvents) -> RowEvents:
        """The events with rows in place of keys; entities not seen before get a row."""
        rows = self.index.find_or_add(events.entity)
        self.ensure()
        return RowEvents(rows, events.occurred_at_us, events.source, events.position, events.values)

    def apply(self, events: ViewEvents | RowEvents, until_us: int | None = None) -> Applied:
        """Add events to the state.

        `until_us` says that with these all events before that time are in (but for late ones);
        it only grows. An event whose tile no answer as of then or later can see is late.
        """
        coded = self.encode(events) if isinstance(events, ViewEvents) else events
        late, touched = self._add(coded) if len(coded) else (0, coded.rows)
        if until_us is not None:
            before_us = self.applied_until_us
            self.applied_until_us = until_us if before_us is None else max(until_us, before_us)
            if self._kept_events is not None:
                self._kept_events.prune(self._visible_from_us(self.applied_until_us))
        return Applied(late, touched)

    def _add(self, events: RowEvents) -> tuple[int, Ints]:
        """Add some events; returns how many were late, and the rows they touched."""
        if self._kept_events is not None:
            corrected = self._kept_events.corrected_rows(events)
            self._kept_events.add(events)
            if len(corrected):
                self._make_anew(corrected)
                plain = self._kept_events.plain(events, corrected)
                late, touched = self._add_plain(plain) if len(plain) else (0, plain.rows)
                return late, np.union1d(touched, corrected)
        return self._add_plain(events)

    def _make_anew(self, rows: Ints) -> None:
        """Replace the state of these rows by that over their events that count."""
        assert self._kept_events is not None
        self._clear(rows)
        counting = self._kept_events.counting(rows, RowEvents.none(len(self.view.columns)))
        if len(counting):
            self._add_plain(counting)

    def _add_plain(self, events: RowEvents) -> tuple[int, Ints]:
        ordered = events.in_order(self.layout)
        touched = ordered.rows[np.flatnonzero(np.diff(ordered.rows, prepend=-1))]
        late = self._apply_tiles(ordered) if self.view.tiles else 0
        self._apply_latest(ordered)
        return late, touched

    def answer(self, entities: Entities, as_of_us: Ints) -> Vectors:
        """The vectors from what has been applied: float32 [n, features].

        A null or unknown entity gets the answer over no events.
        """
        return self.answer_rows(self.index.find(_keys(entities)), as_of_us, ())

    def answer_chunk(
        self, events: ViewEvents | RowEvents, entities: Entities, as_of_us: Ints
    ) -> Vectors:
        """The vectors from what has been applied and those of `events` before each as-of time.

        The same as applying the events one slice after another and answering in between, as long
        as no as-of time is before what has been applied.
        """
        coded = self.encode(events) if isinstance(events, ViewEvents) else events
        return self.answer_rows(self.index.find(_keys(entities)), as_of_us, (coded,))

    def answer_rows(self, rows: Ints, as_of_us: Ints, parts: Sequence[RowEvents]) -> Vectors:
        """`answer_chunk` for rows that `EntityIndex.find` gave out."""
        if self._kept_events is not None and any(len(part) for part in parts):
            return self._answer_corrected(self._kept_events, rows, as_of_us, parts)
        return self._answer_plain(rows, as_of_us, parts)

    def _answer_corrected(
        self, kept: KeptEvents, rows: Ints, as_of_us: Ints, parts: Sequence[RowEvents]
    ) -> Vectors:
        """Requests of rows in which something is corrected meanwhile are answered one by one."""
        more = RowEvents.concatenate(list(parts))
        corrected = np.isin(rows, kept.corrected_rows(more))
        out = self._answer_plain(rows, as_of_us, (more,))
        for at in np.flatnonzero(corrected).tolist():
            row, as_of = rows[at : at + 1], as_of_us[at : at + 1]
            counting = kept.counting(row, more.take(more.occurred_at_us < as_of))
            alone = ViewState(self.view)
            alone._kept_events = None
            alone.index.find_or_add(pl.Series(["it"]))
            alone.ensure()
            if len(counting):
                alone._add_plain(replace(counting, rows=np.ones(len(counting), np.int64)))
            out[at] = alone._answer_plain(np.ones(1, np.int64), as_of, ())[0]
        return out

    def _answer_plain(self, rows: Ints, as_of_us: Ints, parts: Sequence[RowEvents]) -> Vectors:
        if self.layout.sketches and len(rows) > BLOCK:
            blocks = [slice(start, start + BLOCK) for start in range(0, len(rows), BLOCK)]
            answers = [self._answer_plain(rows[b], as_of_us[b], parts) for b in blocks]
            return np.concatenate(answers)
        chunk = Chunk.of(self.layout, parts, rows) if len(rows) else None
        extents = extents_of(self.layout, self.view.tile_us, as_of_us)
        self._place_sessions(rows, extents, chunk)
        windows = self.ring.windows(rows, extents)
        latest = self._latest.take(rows, axis=0)[:, : len(self.layout.latests)]
        if chunk is not None:
            windows = windows.merge(chunk.windows(extents))
            latest = newest(latest, chunk.latest(as_of_us))
        sketches = self.sketches.answer(rows, extents, chunk) if self.layout.sketches else None
        primitives = Primitives(windows.aggregates, windows.decayed, latest, as_of_us, sketches)
        return vectors(self.view, self.layout, primitives)

    def evict(self, before_us: int, keep: Ints | None = None) -> int:
        """Forget entities that no answer as of `before_us` or later depends on; returns how many.

        An answer is never changed by this: an entity goes when its tiles are out of every window
        and its newest record is out of the retention (or the view has no such feature). `keep`
        are rows to leave alone: those of events that wait to be applied.
        """
        rows = self.index.rows
        gone_tile = (before_us - 1) // self.view.tile_us - self.view.tiles
        idle = self.ring.newest_tiles(rows) <= gone_tile
        if self.layout.latests:
            if self.view.retention_us is None:
                return 0
            newest_us = self._latest[rows, self._kept.index(EVENT), 0]
            idle &= newest_us < before_us - self.view.retention_us
        if self._kept_events is not None:
            self._kept_events.prune(self._visible_from_us(before_us))
            idle &= ~np.isin(rows, self._kept_events.events.rows)
        if keep is not None:
            idle &= ~np.isin(rows, keep)
        released = rows[idle]
        self.index.release(released)
        self._clear(released)
        return len(released)

    def _clear(self, rows: Ints) -> None:
        self.ring.clear(rows)
        self.sketches.forget(rows)
        self._latest[rows] = NEVER
        if self.cleared is not None:
            self.cleared.note(rows)

    def _visible_from_us(self, as_of_us: int) -> int:
        """The earliest event time that an answer as of then or later can see."""
        oldest_tile = (as_of_us - 1) // self.view.tile_us - self.view.tiles + 1
        oldest = [oldest_tile * self.view.tile_us] if self.view.tiles else []
        if self.layout.latests and self.view.retention_us is not None:
            oldest.append(as_of_us - self.view.retention_us)
        return min(oldest)

    def merge(self, other: ViewState) -> Ints:
        """Take in what another state of the same view has seen, which must be none of what this one
        has: afterwards this is the state that saw both, bit for bit, in every answer as of
        `applied_until_us` or later.

        Returns the row here of each row of `other`, by its number there.
        """
        rows = np.zeros(other.index.end, np.int64)
        rows[other.index.rows] = self.index.find_or_add(
            pl.Series(other.index.keys, dtype=pl.String)
        )
        self.ensure()
        ends = [one for one in (self.applied_until_us, other.applied_until_us) if one is not None]
        self.applied_until_us = max(ends, default=None)
        if other._kept_events is not None:
            # an event of one may be corrected in the other: what is kept says it all
            kept = other._kept_events.events
            if len(kept):
                self._add(replace(kept, rows=rows[kept.rows]))
            return rows
        there, tiles, parts = other.ring.tiles_at(other.ring.occupied())
        if len(there):
            self.ring.merge(rows[there], tiles, parts)
        self.sketches.merge(other.sketches, rows, self.oldest_tile)
        mine, theirs = rows[other.index.rows], other._latest[other.index.rows]
        self._latest[mine] = newest(self._latest[mine], theirs)
        return rows

    def memory_bytes(self) -> int:
        """Bytes of the arrays and, roughly, of the dictionary."""
        arrays = self.ring.memory_bytes() + self._latest.nbytes + self.sketches.memory_bytes()
        kept = 0 if self._kept_events is None else self._kept_events.memory_bytes()
        return arrays + kept + self.index.memory_bytes()

    def snapshot(self) -> bytes:
        """The whole state as bytes; what no answer can see any more is left out."""
        rows = self.index.rows
        entities = pl.DataFrame({"key": pl.Series(self.index.keys, dtype=pl.String), "row": rows})
        tile_rows, tiles, parts = self.visible_tiles(self.ring.occupied())
        header = {
            "kind": "view",
            "view": self.view.name,
            "fingerprint": self.view.fingerprint,
            "applied_until_us": self.applied_until_us,
        }
        frames = {
            "entities": entities,
            "latest": matrix_frame(self._latest[rows]),
            "slots": pl.DataFrame({"row": tile_rows, "tile": tiles}),
            "sums": matrix_frame(parts.sums),
            "mins": matrix_frame(parts.mins),
            "lasts": matrix_frame(parts.lasts),
        }
        frames |= self.sketches.frames(self.oldest_tile)
        if self._kept_events is not None:
            frames["kept"] = matrix_frame(stacked(self.visible_kept(self._kept_events.events)))
        return pack(header, frames)

    def restore(self, snapshot: bytes) -> None:
        """Take over a snapshot, in place of what there is; Misdeclared if the view has changed."""
        header, frames = unpack(snapshot, "view")
        self.check(header)
        fresh = ViewState(self.view)
        rows = frames["entities"]["row"].to_numpy()
        fresh.index.restore(frames["entities"]["key"].to_list(), rows)
        fresh.ensure()
        fresh._latest[rows] = frame_matrix(frames["latest"], len(rows), *self._latest.shape[1:])
        slots, layout = frames["slots"], self.layout
        parts = Aggregates(
            frame_matrix(frames["sums"], slots.height, len(layout.sums)),
            frame_matrix(frames["mins"], slots.height, len(layout.mins)),
            frame_matrix(frames["lasts"], slots.height, len(layout.lasts), RECORD),
        )
        if slots.height:
            fresh.ring.merge(slots["row"].to_numpy(), slots["tile"].to_numpy(), parts)
        fresh.sketches.load(frames)
        if fresh._kept_events is not None and frames["kept"].height:
            width = 4 + len(self.view.columns)
            saved = frame_matrix(frames["kept"], frames["kept"].height, width)
            fresh._kept_events.add(unstacked(saved))
        fresh.applied_until_us = header["applied_until_us"]
        self.__dict__.update(fresh.__dict__)

    def check(self, header: Mapping[str, Any]) -> None:
        """Misdeclared when what has this header was saved by another form of the view."""
        if header["fingerprint"] != self.view.fingerprint:
            raise Misdeclared(
                f"view {self.view.name!r} is not the one its state was saved by "
                f"({header['view']!r}): give a changed view a new version and replay its events"
            )

    def visible_tiles(self, slots: Ints) -> tuple[Ints, Ints, Aggregates]:
        """Row, tile and aggregates of those of the slots that an answer may still see."""
        seen = slots[self.ring.held[slots] > self.oldest_tile]
        return self.ring.tiles_at(seen)

    def visible_kept(self, events: RowEvents) -> RowEvents:
        """Those of the events, kept for corrections, that an answer may still see."""
        if self._kept_events is None or self.applied_until_us is None:
            return events
        return self._kept_events.visible(events, self._visible_from_us(self.applied_until_us))

    def _place_sessions(self, rows: Ints, extents: Extents, chunk: Chunk | None) -> None:
        """Find out how far back each open session goes, and write it into `extents.high`."""
        sessions = [i for i, w in enumerate(self.layout.windows) if w.shape == "session"]
        if not sessions:
            return
        parts = [self.layout.mins.index((sign, TIME)) for sign in (1, -1)]
        found = self.ring.tile_minima(rows, extents.newest_tile, parts)
        first, last = found[:, :, 0], -found[:, :, 1]
        if chunk is not None:
            from_chunk = chunk.tile_times(extents, first.shape[1])
            first, last = np.minimum(first, from_chunk[0]), np.maximum(last, from_chunk[1])
        for place in sessions:
            ages, gap_us = self.layout.spans[place], self.layout.windows[place].part_us
            extents.high[:, place] = session_ages(
                first[:, :ages], last[:, :ages], extents.as_of_us, gap_us
            )

    def ensure(self, rows: int = 0) -> None:
        """Make room for all entities, and for so many rows."""
        have, need = len(self._latest), max(self.index.end, rows)
        if need <= have:
            return
        capacity = max(need, 2 * have, 16)
        grown = np.full((capacity, len(self._kept), RECORD), NEVER, np.int64)
        grown[:have] = self._latest
        self._latest = grown
        self.ring.ensure(capacity)

    def _apply_tiles(self, events: RowEvents) -> int:
        tiles = events.occurred_at_us // self.view.tile_us
        visible = tiles > self.oldest_tile
        late = len(events) - int(np.count_nonzero(visible))
        if late:
            events, tiles = events.take(visible), tiles[visible]
        if not len(events):
            return late
        starts = _starts(events.rows, tiles)
        rows, of_run = events.rows[starts], tiles[starts]
        parts = reduce_segments(self.layout, events, starts)
        fits = of_run > _newest_of_row(rows, of_run) - self.ring.length
        if not fits.all():
            # a batch longer than the ring: its own newer tiles take the slots
            rows, of_run = rows[fits], of_run[fits]
            parts = Aggregates(parts.sums[fits], parts.mins[fits], parts.lasts[fits])
        fresh = self.ring.merge(rows, of_run, parts)
        self.sketches.add(events, tiles, self.oldest_tile)
        if not fresh.all():
            sizes = np.diff(starts, append=len(events))[fits]
            late += int(sizes[~fresh].sum())
        return late

    @property
    def oldest_tile(self) -> int:
        """The newest tile that has left every window an answer may still be asked for."""
        if self.applied_until_us is None:
            return EMPTY
        return (self.applied_until_us - 1) // self.view.tile_us - self.view.tiles

    def _apply_latest(self, events: RowEvents) -> None:
        if not self._kept:
            return
        starts = np.flatnonzero(np.diff(events.rows, prepend=-1))
        rows = events.rows[starts]
        found = np.stack(
            [records_of_segments(events, 1, column, starts) for column in self._kept], axis=1
        )
        self._latest[rows] = newest(self._latest[rows], found)
        if self.touched is not None:
            self.touched.note(rows)


def _keys(entities: Entities) -> pl.Series:
    return entities if isinstance(entities, pl.Series) else pl.Series(entities, dtype=pl.String)


def _starts(rows: Ints, tiles: Ints) -> Ints:
    """Where runs of equal (row, tile) begin."""
    changed = np.ones(len(rows), np.bool_)
    changed[1:] = (rows[1:] != rows[:-1]) | (tiles[1:] != tiles[:-1])
    return np.flatnonzero(changed)


def _newest_of_row(rows: Ints, tiles: Ints) -> Ints:
    """For runs sorted by (row, tile): the newest tile of each run's row."""
    ends = np.flatnonzero(np.append(rows[1:] != rows[:-1], True))
    return np.repeat(tiles[ends], np.diff(ends, prepend=-1))
