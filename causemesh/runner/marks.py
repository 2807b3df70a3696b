"""High-water marks: drop what was seen already, in O(1) memory per cause source.

A worker emits the outputs of one input partition in input order and begins again from a committed
position after a crash. So on any later partition the records of one cause source rise in
(position, index), except for replays, which are at or below the highest seen.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from causemesh.bus.base import TopicPartition

Mark = tuple[int, int]
_NOTHING: Mark = (-1, -1)
_FEW = 64  # so few rows are grouped sooner one by one than by columns (measured)


class HighWaterMarks:
    """The highest (position, index) per input partition and cause source."""

    def __init__(self, *, enabled: bool = True) -> None:
        self._enabled = enabled  # off only in the control arm of the simulation
        self._marks: dict[TopicPartition, dict[TopicPartition, Mark]] = {}

    def fresh(self, source: TopicPartition, causes: pl.DataFrame) -> npt.NDArray[np.bool_]:
        """Which rows are new, and move the marks past them.

        `causes` has columns topic, partition, position, index in log order.
        """
        keep = np.ones(causes.height, dtype=bool)
        if not self._enabled or causes.height == 0:
            return keep
        marks = self._marks.setdefault(source, {})
        positions = causes["position"].to_numpy()
        indexes = causes["index"].to_numpy()
        for (topic, partition), rows in _rows_by_source(causes):
            mark = marks.get((topic, partition), _NOTHING)
            good, mark = _rising(positions[rows], indexes[rows], mark)
            keep[rows] = good
            marks[(topic, partition)] = mark
        return keep

    def dump(self) -> list[list[Any]]:
        """JSON-ready form."""
        return [
            [*tp, *source, *mark] for tp, by in self._marks.items() for source, mark in by.items()
        ]

    def load(self, rows: list[list[Any]]) -> None:
        """Replace the marks by a dumped form."""
        self._marks = {}
        for topic, partition, cause_topic, cause_partition, position, index in rows:
            by_source = self._marks.setdefault((topic, partition), {})
            by_source[(cause_topic, cause_partition)] = (position, index)


def _rows_by_source(
    causes: pl.DataFrame,
) -> list[tuple[TopicPartition, npt.NDArray[np.int64]]]:
    topics, partitions = causes["topic"], causes["partition"]
    if causes.height <= _FEW:
        rows_of: dict[TopicPartition, list[int]] = {}
        for row, source in enumerate(zip(topics.to_list(), partitions.to_list(), strict=True)):
            rows_of.setdefault(source, []).append(row)
        return [(source, np.array(rows, dtype=np.int64)) for source, rows in rows_of.items()]
    if (topics == topics[0]).all():  # as good as always: no need of the query engine
        numbers = partitions.to_numpy()
        return [
            ((topics[0], number), np.flatnonzero(numbers == number))
            for number in np.unique(numbers).tolist()
        ]
    grouped = (
        pl.DataFrame([topics, partitions])
        .with_row_index("row")
        .group_by("topic", "partition", maintain_order=True)
        .agg("row")
    )
    return [
        ((topic, partition), np.asarray(rows, dtype=np.int64))
        for topic, partition, rows in grouped.iter_rows()
    ]


def _rising(
    positions: npt.NDArray[np.int64], indexes: npt.NDArray[np.int32], mark: Mark
) -> tuple[npt.NDArray[np.bool_], Mark]:
    """Rows that exceed the mark and every row before them, and the new mark."""
    above = (positions > mark[0]) | ((positions == mark[0]) & (indexes > mark[1]))
    step = np.diff(positions)
    in_order = (step > 0) | ((step == 0) & (np.diff(indexes) > 0))
    if above[0] and bool(in_order.all()):
        return above, (int(positions[-1]), int(indexes[-1]))
    rank = np.empty(len(positions), dtype=np.int64)
    order = np.lexsort((indexes, positions))
    changed = np.diff(positions[order]).astype(bool) | np.diff(indexes[order]).astype(bool)
    rank[order] = np.concatenate(([0], np.cumsum(changed)))
    before = np.concatenate(([-1], np.maximum.accumulate(rank)[:-1]))
    highest = int(order[-1])
    top = (int(positions[highest]), int(indexes[highest]))
    return above & (rank > before), max(mark, top)
