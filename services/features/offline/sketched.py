"""Sketches over spans: the cells of whole tiles, and those of the events of a tile that is cut.

What an event brings to a sketch and what its cells say is the sketches' own code; which cells a
window holds is worked out here.
"""

from __future__ import annotations

import numpy as np
import polars as pl

from services.features.domain.definitions import Feature
from services.features.domain.sketches import (
    MAX_VALUES,
    SketchKind,
    cells_of,
    distinct,
    quantile,
    share,
    top,
)
from services.features.offline.history import History, Mask
from services.features.offline.numbers import Floats
from services.features.offline.spans import Span, blocks, expanded

KINDS: dict[str, SketchKind] = {
    "distinct": "registers",
    "quantile": "buckets",
    "top": "values",
    "share": "values",
}
_TOGETHER = 2**21  # so many cells are merged at once


class TileCells:
    """The cells of one sketch, tile by tile."""

    def __init__(self, history: History, kind: SketchKind, column: str) -> None:
        self._history = history
        self._kind = kind
        here = np.flatnonzero(history.present(column))
        cells, values = cells_of(kind, history.units(column)[here])
        self._events = pl.DataFrame({"cell": cells, "value": values})
        self._event_starts = history.counts(column)
        by_tile = self._events.with_columns(pl.Series("owner", history.tile_of[here]))
        self._tiles = self._merged(by_tile)
        tiles = np.arange(len(history.tile_starts))
        self._tile_starts = np.searchsorted(self._tiles["owner"].to_numpy(), tiles)

    def answer(self, feature: Feature, span: Span) -> Floats:
        """One number a request."""
        sizes = self._tile_starts[span.whole] - self._tile_starts[span.first]
        sizes = np.maximum(sizes, 0) + self._event_starts[span.high] - self._event_starts[span.part]
        out = np.empty(len(span.low))
        for block in blocks(sizes + 1, _TOGETHER):
            out[block] = self._block(feature, span.block(block))
        return out

    def _block(self, feature: Feature, span: Span) -> Floats:
        starts = self._tile_starts
        owners, at = expanded(starts[span.first], starts[span.whole])
        older = self._tiles[at].select("cell", "value").with_columns(pl.Series("owner", owners))
        starts = self._event_starts
        owners, at = expanded(starts[span.part], starts[span.high])
        newer = self._merged(self._events[at].with_columns(pl.Series("owner", owners)))
        found = self._merged(pl.concat([older, newer], how="diagonal"))
        numbers = _read(feature, found, len(span.low), self._history.view.resolution)
        if self._kind == "values":
            numbers[self._crowded(span) | _crowded(newer, len(span.low))] = np.nan
        return numbers

    def _crowded(self, span: Span) -> Mask:
        """Which requests see a whole tile with too many values."""
        crowded = np.diff(self._tile_starts) > MAX_VALUES
        running = np.concatenate(([0], np.cumsum(crowded)))
        return np.asarray(running[np.maximum(span.whole, span.first)] > running[span.first])

    def _merged(self, cells: pl.DataFrame) -> pl.DataFrame:
        value = pl.col("value")
        merged = value.max() if self._kind == "registers" else value.sum()
        return cells.group_by("owner", "cell").agg(merged).sort("owner", "cell")


def _crowded(cells: pl.DataFrame, count: int) -> Mask:
    owners = cells["owner"].to_numpy()
    return np.bincount(owners, minlength=count) > MAX_VALUES


def _read(feature: Feature, cells: pl.DataFrame, count: int, resolution: float) -> Floats:
    owners, keys, values = (cells[name].to_numpy() for name in ("owner", "cell", "value"))
    if feature.aggregation == "distinct":
        return distinct(owners, values, count)
    if feature.aggregation == "quantile":
        return quantile(owners, keys, values, feature.parameter, count) * resolution
    if feature.aggregation == "top":
        return top(owners, keys, values, int(feature.parameter), count) * resolution
    return share(owners, keys, values, int(feature.parameter), count)


def tile_cells(
    history: History, feature: Feature, made: dict[tuple[SketchKind, str], TileCells]
) -> TileCells:
    """The cells that a feature reads; `made` keeps them for others of the same sketch."""
    assert feature.column is not None
    key = (KINDS[feature.aggregation], feature.column)
    if key not in made:
        made[key] = TileCells(history, *key)
    return made[key]
