"""High-water marks against an id table that remembers everything."""

from __future__ import annotations

import random

import polars as pl
import pytest

from causemesh.runner.marks import HighWaterMarks


def causes(rows: list[tuple[int, int, int]]) -> pl.DataFrame:
    """(partition, position, index) rows."""
    return pl.DataFrame(
        [("in", *row) for row in rows],
        schema={"topic": pl.String, "partition": pl.Int32, "position": pl.Int64, "index": pl.Int32},
        orient="row",
    )


@pytest.mark.parametrize("few", [0, 64])
@pytest.mark.parametrize("seed", range(40))
def test_replays_are_dropped_and_nothing_else(
    seed: int, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sources emit in order but start over from an earlier point; batches cut anywhere.

    By rows where they are few, and by columns."""
    monkeypatch.setattr("causemesh.runner.marks._FEW", few)
    rng = random.Random(seed)
    streams = []
    for partition in range(3):
        original = [(partition, position, index) for position in range(20) for index in range(2)]
        log, at = [], 0
        while at < len(original):
            length = rng.randint(1, 9)
            log += original[at : at + length]
            at = (
                max(0, at + length - rng.randint(0, 6))
                if at + length < len(original)
                else at + length
            )
        streams.append(log)
    merged = []
    while any(streams):
        merged.append(rng.choice([stream for stream in streams if stream]).pop(0))
    marks = HighWaterMarks()
    kept = []
    at = 0
    while at < len(merged):
        length = rng.randint(1, 15)
        part = merged[at : at + length]
        keep = marks.fresh(("t", 0), causes(part))
        kept += [row for row, good in zip(part, keep, strict=True) if good]
        at += length
        if rng.random() < 0.3:
            dumped = marks.dump()
            marks = HighWaterMarks()
            marks.load(dumped)
    assert len(kept) == len(set(kept)) == 120
    for partition in range(3):
        own = [row for row in kept if row[0] == partition]
        assert own == sorted(own)


def test_switched_off_marks_let_replays_through() -> None:
    marks = HighWaterMarks(enabled=False)
    rows = causes([(0, 1, 0), (0, 1, 0)])
    assert marks.fresh(("t", 0), rows).all()
    assert HighWaterMarks().fresh(("t", 0), rows).tolist() == [True, False]
