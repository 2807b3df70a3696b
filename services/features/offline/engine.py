"""The batch engine: what the stream answers for an entity as of a time, from the set of events.

A second implementation of the views beside `domain/engine.py`, which keeps rings of tiles as events
come: this one sorts all events once and answers all requests together. Only the reading of events
(filter, expressions, grid) and the sketches' own functions are shared.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import polars as pl

from services.features.domain.definitions import Feature, FeatureView
from services.features.domain.events import Ints, ViewEvents
from services.features.domain.sketches import SketchKind
from services.features.domain.vectors import Vectors
from services.features.domain.windows import Window
from services.features.offline.corrections import takes_corrections, with_ends
from services.features.offline.history import NOBODY, History
from services.features.offline.meanwhile import LASTING, laid_out, meanwhile
from services.features.offline.numbers import Floats, newest_of, number_of
from services.features.offline.sketched import KINDS, TileCells, tile_cells
from services.features.offline.spans import Asked, Span, span_of

_TOGETHER = 2**20  # so many events are laid out anew at once


def answers(
    view: FeatureView,
    events: ViewEvents,
    entities: pl.Series,
    as_of_us: Ints,
    since_us: Ints | None = None,
) -> Vectors:
    """The features of each (entity, as-of time): float32 [n, features].

    `events` are all that the view took, in any order; each counts for as-of times after `since_us`,
    which is never before its own time, and that where it is not given. A null or unknown entity
    gets the answer over no events.
    """
    keys = pl.DataFrame({"key": entities.unique().drop_nulls()})
    numbered = keys.with_columns(pl.int_range(pl.len(), dtype=pl.Int64).alias("number"))
    asked_for = (
        entities.alias("key").to_frame().join(numbered, on="key", how="left", maintain_order="left")
    )
    numbers = asked_for["number"].fill_null(NOBODY).to_numpy()
    order = np.lexsort((as_of_us, numbers))
    asked = Asked(numbers[order], as_of_us[order])
    out = np.empty((len(asked), len(view.features)), np.float32)
    out[order] = _answer(view, _table(view, events, since_us), numbered, asked)
    return out


def _table(view: FeatureView, events: ViewEvents, since_us: Ints | None) -> pl.DataFrame:
    """Events as in `history.py`, their entities still keys; those that ever count. With the columns
    of `meanwhile.py` where some do not count since their own time or for good."""
    table = events.frame(view).rename({"entity": "key", "occurred_at_us": "at"})
    late = since_us is not None and bool((since_us > events.occurred_at_us).any())
    if not late and not takes_corrections(view):
        return table
    since = table["at"] if since_us is None else pl.Series(since_us)
    table = table.with_columns(since.alias("since"))
    if takes_corrections(view):
        return with_ends(view, table)
    return table.with_columns(pl.lit(None, pl.Int64).alias("until"))


def _answer(
    view: FeatureView, table: pl.DataFrame, numbered: pl.DataFrame, asked: Asked
) -> Vectors:
    known = table.join(numbered, on="key").drop("key").rename({"number": "entity"})
    if "until" not in known.columns:
        return _vectors(History(view, known), asked)
    out = _vectors(History(view, known.filter(LASTING)), asked)
    others = np.flatnonzero(meanwhile(known, asked))
    for part in laid_out(view, known, asked.take(others), _TOGETHER):
        out[others[part.places]] = _vectors(History(view, part.events), part.asked)
    return out


def _vectors(history: History, asked: Asked) -> Vectors:
    view = history.view
    out = np.empty((len(asked), len(view.features)), np.float32)
    spans: dict[Window, Span] = {}
    cells: dict[tuple[SketchKind, str], TileCells] = {}

    def over(feature: Feature, window: Window) -> Floats:
        if window not in spans:
            spans[window] = span_of(history, asked, window)
        if feature.aggregation in KINDS:
            return tile_cells(history, feature, cells).answer(feature, spans[window])
        return number_of(history, asked, feature, spans[window])

    for place, feature in enumerate(view.features):
        out[:, place] = _feature(history, asked, feature, over)
    return out


def _feature(
    history: History,
    asked: Asked,
    feature: Feature,
    over: Callable[[Feature, Window], Floats],
) -> Floats:
    if feature.window is None:
        return newest_of(history, asked, feature)
    numbers = over(feature, feature.window)
    if feature.per is None:
        return numbers
    divisor = over(feature, feature.per)
    none = divisor == 0
    return np.where(none, np.nan, numbers / np.where(none, 1.0, divisor))
