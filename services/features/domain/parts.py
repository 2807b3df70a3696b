"""Parts of a view's state as bytes: all of some rows, or what changed since the last checkpoint.

Nearly all of a part is content as it is now, so a later part simply replaces it. Cells of sketches
and events kept for corrections are what was *added*; rows that were cleared in between come first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Sized

import numpy as np

from services.features.domain.aggregates import NEVER, Aggregates, stacked, unstacked
from services.features.domain.cells import Cells
from services.features.domain.changes import Touched
from services.features.domain.columns import pack_columns, unpack_columns
from services.features.domain.engine import ViewState
from services.features.domain.events import Ints
from services.features.domain.memory import entity_bytes

PIECE_BYTES = 8 * 2**20
"""About what the rows of a piece hold in memory."""
LEAST_ROWS = 64
Encode = Callable[[], bytes]


def piece_rows(state: ViewState) -> int:
    """How many rows of a view make a piece."""
    return max(LEAST_ROWS, PIECE_BYTES // entity_bytes(state.view))


def track(state: ViewState) -> None:
    """Begin to note what changes."""
    state.index.changed, state.ring.touched = Touched(), Touched()
    state.touched, state.cleared = Touched(), Touched()
    state.sketches.track()
    if state.kept_events is not None:
        state.kept_events.unsaved = []


def rows_part(state: ViewState, rows: slice) -> Encode:
    """All of a range of rows."""
    rows = slice(rows.start, min(rows.stop, state.index.end))
    every = np.arange(rows.start, rows.stop)
    cells = state.sketches.dump(state.oldest_tile, rows)
    slots = _slots(state, state.ring.occupied(rows))
    arrays = slots | {"latest_rows": every, "latest": state.latest[rows].copy()}
    if state.kept_events is not None:
        events = state.kept_events.events
        inside = (events.rows >= rows.start) & (events.rows < rows.stop)
        arrays["kept"] = stacked(state.visible_kept(events.take(inside)))
    return _encode(state, [rows.start, rows.stop], arrays, every, cells)


def changes_part(state: ViewState) -> Encode | None:
    """What changed since the last call or since `track`; None where nothing did."""
    assert state.index.changed is not None
    assert state.ring.touched is not None
    assert state.touched is not None
    assert state.cleared is not None
    changed, touched = state.index.changed.take(), state.touched.take()
    slots = _slots(state, state.ring.touched.take())
    cells = state.sketches.take_unsaved(state.oldest_tile)
    arrays = slots | {"cleared": state.cleared.take(), "latest_rows": touched}
    arrays["latest"] = state.latest[touched]
    if state.kept_events is not None:
        arrays["kept"] = stacked(state.visible_kept(state.kept_events.take_unsaved()))
    parts: list[Sized] = [changed, *arrays.values(), *cells]
    if not any(len(part) for part in parts):
        return None
    return _encode(state, None, arrays, changed, cells)


def _encode(
    state: ViewState,
    span: list[int] | None,
    arrays: dict[str, Ints],
    named: Ints,
    cells: Sequence[Cells],
) -> Encode:
    """Arrays that are the part's own; `named` are rows whose keys it tells."""
    keys = state.index.keys_of(named)
    header = {
        "kind": "view-part",
        "view": state.view.name,
        "fingerprint": state.view.fingerprint,
        "applied_until_us": state.applied_until_us,
        "rows": span,
        "end": state.index.end,
    }
    sketches = state.sketches
    return lambda: pack_columns(
        header, _filled({**arrays, "named": named, **sketches.arrays(cells)}), keys
    )


def apply_part(state: ViewState, body: bytes) -> None:
    """Take over a part. Misdeclared when it is of another form of the view."""
    header, arrays, keys = unpack_columns(body, "view-part")
    state.check(header)
    state.ensure(header["end"])
    state.applied_until_us = header["applied_until_us"]
    _clear(state, header["rows"], arrays)
    if "named" in arrays:
        state.index.put(keys, arrays["named"])
        state.ensure()
    if "latest" in arrays:
        state.latest[arrays["latest_rows"]] = arrays["latest"]
    if "tiles" in arrays:
        parts = Aggregates(arrays["sums"], arrays["mins"], arrays["lasts"])
        state.ring.put(arrays["tile_rows"], arrays["tiles"], parts)
    state.sketches.put(arrays, state.oldest_tile)
    if state.kept_events is not None and "kept" in arrays:
        state.kept_events.add(unstacked(arrays["kept"]))


def _clear(state: ViewState, span: list[int] | None, arrays: Mapping[str, Ints]) -> None:
    """Empty what the part replaces: all of its range, or the rows that were cleared."""
    if span is not None:
        rows = slice(span[0], span[1])
        state.index.put([None] * (span[1] - span[0]), np.arange(span[0], span[1]))
        state.ensure()
        state.ring.clear(rows)
        state.sketches.forget_range(rows)
        state.latest[rows] = NEVER
        if state.kept_events is not None:
            state.kept_events.drop(rows)
        return
    if "cleared" in arrays:
        state.ring.clear(arrays["cleared"])
        state.sketches.forget(arrays["cleared"])
        state.latest[arrays["cleared"]] = NEVER
    if state.kept_events is not None and "named" in arrays:
        # a row that was released had no kept event then, and may have other ones since
        state.kept_events.drop(arrays["named"])


def _slots(state: ViewState, slots: Ints) -> dict[str, Ints]:
    rows, tiles, parts = state.visible_tiles(slots)
    names = ("tile_rows", "tiles", "sums", "mins", "lasts")
    return dict(zip(names, (rows, tiles, parts.sums, parts.mins, parts.lasts), strict=True))


def _filled(arrays: Mapping[str, Ints]) -> dict[str, Ints]:
    """Without those that say nothing."""
    return {name: array for name, array in arrays.items() if len(array)}
