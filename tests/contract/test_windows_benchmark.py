"""What arms of the windows' benchmark are compared with, and that a wrong answer is no result."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from benchmarks import windows_vs_peers as windows
from benchmarks.peers import windowed
from benchmarks.readings import HOUR_US, START_US, frames
from services.features.domain.engine import ViewState
from services.features.domain.events import read_events
from services.features.domain.parsing import parse_views

_COUNT, _SENSORS = 3_000, 100


@pytest.fixture(scope="module")
def readings() -> pl.DataFrame:
    found = pl.concat(frames(_COUNT, _SENSORS, 6))
    return found.select(
        "tenant_id",
        "sensor",
        "value",
        pl.col("sensor").alias("key"),
        at_us=pl.col("occurred_at").to_physical(),
    )


def ours(readings: pl.DataFrame, folder: Path) -> pl.DataFrame:
    """As the service's run writes it."""
    (view,) = parse_views(windows.VIEWS)
    state = ViewState(view)
    events = readings.with_columns(
        occurred_at_us=pl.col("at_us"), source=pl.lit(0, pl.Int64), position=pl.int_range(pl.len())
    )
    state.apply(read_events(view, events))
    keys = state.index.keys
    matrix = state.answer(keys, np.full(len(keys), START_US + 6 * HOUR_US, np.int64))
    columns = {feature.name: matrix[:, place] for place, feature in enumerate(view.features)}
    pl.DataFrame({"key": keys, **columns}).write_parquet(folder / "ours.parquet")
    return windows.answers_of_vectors(folder / "ours.parquet")


def peer(readings: pl.DataFrame, folder: Path) -> pl.DataFrame:
    """As the Python peers fold and write it."""
    newest_us = readings["at_us"][-1]
    states: dict[int, dict[str, windowed.State]] = {hours: {} for hours in windowed.HOURS}
    for key, value, at_us in readings.select("key", "value", "at_us").rows():
        for hours, of in states.items():
            if at_us // (hours * HOUR_US) == newest_us // (hours * HOUR_US):
                of[key] = windowed.added(of.get(key, windowed.nothing()), value)
    result = folder / "peer.csv"
    windowed.write_results(str(result), {hours: list(of.items()) for hours, of in states.items()})
    return windows.answers_of_peer(result)


def test_ours_and_a_peers_are_what_the_readings_say(readings: pl.DataFrame, tmp_path: Path) -> None:
    truth = windows.expected(readings)
    assert set(truth["hours"]) == {1, 2, 3}
    windows.check(ours(readings, tmp_path), truth)
    windows.check(peer(readings, tmp_path), truth)
    part = readings[: _COUNT // 12]
    windows.check(peer(part, tmp_path), windows.expected(part))


def test_a_wrong_answer_is_no_result(readings: pl.DataFrame, tmp_path: Path) -> None:
    truth, found = windows.expected(readings), peer(readings, tmp_path)
    for name in (*windows.EXACT, *windows.ROUNDED):
        wrong = found.with_columns(
            pl.when(pl.int_range(pl.len()) == 7).then(pl.col(name) + 1 / 64).otherwise(name)
        )
        with pytest.raises(RuntimeError, match=f"{name} is wrong in 1 windows"):
            windows.check(wrong, truth)
    for other in (found[1:], pl.concat([found, found[:1]])):
        with pytest.raises(RuntimeError, match="windows answered"):
            windows.check(other, truth)
