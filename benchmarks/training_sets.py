"""How fast training sets are made of a lake: the flights of a year, and a made-up stream.

usage: python -m benchmarks.training_sets [--months 12] [--rows 1000000] [--rounds 3]

flights: every request of the months with the 16 features of the example, out of a lake that holds
their events as its writer leaves them after compaction, one file a tenant and day. made up: as many
rows as asked for, over as many events, 100,000 entities, eight aggregations over three windows.

Figures go by processor time of the whole process, threads included, and by the clock.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl

from benchmarks.feature_windows import PLAIN, view_of
from causemesh.catalogue import Catalogue
from causemesh.codec.columns import frame_schema
from causemesh.lake.commits import Change, commit
from causemesh.lake.definitions import define_lake
from causemesh.lake.opening import open_catalog
from causemesh.lake.progress import PartitionProgress, TableProgress
from causemesh.lake.reading import Lake
from causemesh.lake.rows import table_columns
from causemesh.lake.settings import LakeSettings
from causemesh.lake.tables import ensure, write
from examples.flights.dataset import load
from examples.flights.model import FEATURES
from examples.flights.offline import _unpacked
from services.features.domain.events import read_events
from services.features.offline.definitions import Definitions
from services.features.offline.engine import answers
from services.features.offline.training import training_set

PROJECT = Path(__file__).parents[1] / "examples" / "flights"
_ENTITIES, _HOUR_US = 100_000, 3_600_000_000
_PROMISE = ["inbox", 0, 2**62]


def settings_of(folder: Path) -> LakeSettings:
    """A lake in a folder."""
    return LakeSettings(
        catalog=f"sqlite:///{folder}/catalog.db", warehouse=f"file://{folder}/tables"
    )


def fill(folder: Path, catalogue: Catalogue, frames: Mapping[str, pl.DataFrame]) -> None:
    """Write event topics to their tables."""
    definition, catalog = define_lake(catalogue, None), open_catalog(settings_of(folder))
    for name, frame in frames.items():
        topic = catalogue.topic(name)
        (decoded,) = (one for one in definition.of_topic(name) if one.zone == "decoded")
        table = ensure(catalog, decoded, table_columns(decoded, topic))
        schema = frame_schema(topic.record)
        known = [frame[one].cast(kind) for one, kind in schema.items() if one in frame.columns]
        rows = pl.DataFrame(known).with_columns(
            pl.lit(0, pl.Int32).alias("_partition"), pl.int_range(pl.len()).alias("_position")
        )
        progress = TableProgress({0: PartitionProgress(1, 2**40, [], [_PROMISE])})
        change = Change(progress, write(table, rows))
        commit(catalog, decoded.identifier, partial(_always, change))
    catalog.close()


def _always(change: Change, *_: object) -> Change:
    return change


def flights(months: int, rounds: int) -> None:
    """The months' requests."""
    definitions, replay = Definitions.of(PROJECT), load(months)
    folder = Path(tempfile.mkdtemp(prefix="causemesh-training-"))
    try:
        events = {f"events.{kind}": f for kind, f in replay.frames.items() if kind != "requests"}
        fill(folder, definitions.catalogue, events)
        entities = ["tail", "origin", "dest", "carrier"]
        requests = _unpacked(replay.requests).select("tenant_id", "occurred_at", *entities)
        names = [name for name in FEATURES if not name.startswith("input.")]
        count = sum(frame.height for frame in events.values())
        print(f"flights: {requests.height:,} rows, {count:,} events, {len(names)} features")
        for _ in range(rounds):
            cpu, wall = time.process_time(), time.perf_counter()
            with Lake.open(settings_of(folder), definitions.catalogue, None) as lake:
                made = training_set(requests, names, lake, definitions)
            made.write(folder / "made.parquet")
            report(requests.height, time.process_time() - cpu, time.perf_counter() - wall)
    finally:
        shutil.rmtree(folder)


def made_up(rows: int, rounds: int) -> None:
    """The engine alone: events in memory."""
    view = view_of(PLAIN, ["1h", "2h", "3h"], "5m")
    rng = np.random.default_rng(1)
    frame = pl.DataFrame(
        {
            "tenant_id": pl.repeat("t", rows, eager=True),
            "k": pl.Series(rng.integers(0, _ENTITIES, rows)).cast(pl.String),
            "occurred_at_us": rng.integers(0, 24 * _HOUR_US, rows),
            "source": np.zeros(rows, np.int64),
            "position": np.arange(rows),
            "x": rng.normal(0, 3, rows),
        }
    )
    keys = pl.Series(rng.integers(0, _ENTITIES, rows)).cast(pl.String)
    as_of_us = rng.integers(0, 24 * _HOUR_US, rows)
    print(f"made up: {rows:,} rows, {rows:,} events, {len(view.features)} features")
    for _ in range(rounds):
        cpu, wall = time.process_time(), time.perf_counter()
        tenants = pl.select(pl.concat_str(pl.lit("t"), keys, separator="\x1f")).to_series()
        answers(view, read_events(view, frame), tenants, as_of_us)
        report(rows, time.process_time() - cpu, time.perf_counter() - wall)


def report(rows: int, cpu_s: float, wall_s: float) -> None:
    """One line a round."""
    print(f"  {rows / cpu_s:,.0f} rows a CPU second ({cpu_s:.2f} s CPU, {wall_s:.2f} s)")


def main() -> None:
    """Both."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--months", type=int, default=12)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    told = parser.parse_args()
    flights(told.months, told.rounds)
    made_up(told.rows, told.rounds)


if __name__ == "__main__":
    main()
