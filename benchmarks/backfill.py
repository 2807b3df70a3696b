"""How long a year of flights takes as the past of new views: from lake and log to their states.

usage: python -m benchmarks.backfill [--months 12] [--rounds 3] [--dry]

The year's departures, landings and weather lie in a log in memory, in four partitions, and in a
lake on local files (SQLite catalog), a file a tenant and day for each 200,000 records, as the
writer makes them in a replay. Then the pasts of all four partitions are computed by the service's
own code:

- year: five views that see the whole year (count, mean and a quantile over 364 days, latest value),
  and the same without a lake;
- example: the six views of the example, which see 14 days at most.

CPU is of the whole process, threads included; the machine may be shared. A task beside it in the
event loop notes how much later than it should it goes on: so long would a request wait. How many
events went into the states is compared with a recount.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import tempfile
import time
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import yaml
from pyiceberg.table import Table

from benchmarks.harness import Arm, Figures, rounds, save, show, table, versions
from causemesh.bus.base import Outbound
from causemesh.bus.memory import MemoryBus
from causemesh.bus.partitioner import partitions_of
from causemesh.catalogue import Catalogue
from causemesh.codec.decode import Decoder
from causemesh.codec.encode import RegistryEncoders
from causemesh.codec.registry import MemoryRegistry
from causemesh.collector import collect_seldom
from causemesh.lake.commits import Change, commit
from causemesh.lake.definitions import define_lake
from causemesh.lake.opening import open_catalog
from causemesh.lake.progress import PartitionProgress, TableProgress
from causemesh.lake.reading import Lake
from causemesh.lake.rows import table_columns
from causemesh.lake.settings import LakeSettings
from causemesh.lake.tables import ensure, write
from examples.flights.dataset import load
from services.features.backfill.filling import Order
from services.features.backfill.lake_past import LakePast, past_in
from services.features.backfill.log_past import LogPast
from services.features.backfill.pasts import Pasts
from services.features.domain.definitions import FeatureView
from services.features.domain.parsing import parse_views

PROJECT = Path(__file__).parents[1] / "examples" / "flights"
PARTITIONS, COMMIT = 4, 200_000
_DAY_US = 86_400_000_000
_TICK_S = 0.005
_YEAR = {"*": ["count 364d"], "delay": ["mean 364d", "p90 364d", "latest"]}
_LANDED = {"event": "flight_landed", "columns": {"delay": "arrival_delay_minutes"}}
_DEPARTED = {"event": "flight_departed", "columns": {"delay": "departure_delay_minutes"}}
_SHARED = {"scope": "shared", "tile": "7d", "features": _YEAR}


def year_views() -> list[FeatureView]:
    """Views that see all of it."""
    body = {
        "tails": {**_LANDED, **_SHARED, "entity": "tail", "placement": "rekeyed"},
        "routes": {**_LANDED, **_SHARED, "entity": ["origin", "dest"], "placement": "broadcast"},
        "origins": {**_DEPARTED, **_SHARED, "entity": "origin", "placement": "broadcast"},
        "carriers": {**_DEPARTED, **_SHARED, "entity": "carrier", "placement": "broadcast"},
        "flights": {**_DEPARTED, **_SHARED, "entity": "flight_id", "placement": "partitioned"},
    }
    return parse_views({"views": body})


class Year:
    """The log and the lake."""

    def __init__(self, folder: Path, months: int) -> None:
        self.catalogue = Catalogue.load([PROJECT], partitions=PARTITIONS)
        self.bus, self.registry = MemoryBus(), MemoryRegistry()
        self.settings = LakeSettings(
            catalog=f"sqlite:///{folder}/c.db", warehouse=f"file://{folder}/tables"
        )
        self.definition = define_lake(self.catalogue, None)
        self.files = 0
        self.until_us = 0
        self.frames: dict[str, pl.DataFrame] = {}
        for kind, frame in load(months).frames.items():
            if kind != "requests":
                asyncio.run(self._fill(kind, frame))

    async def _fill(self, kind: str, frame: pl.DataFrame) -> None:
        topic = self.catalogue.topic(f"events.{kind}")
        self.bus.create(topic.name, topic.partitions)
        keys = frame[topic.key].cast(pl.String).to_list()
        chosen = partitions_of([key.encode() for key in keys], PARTITIONS, unkeyed=0)
        encoder = await RegistryEncoders(self.registry).encoder(topic.subject, topic.record)
        producer, parts = self.bus.producer("benchmark"), []
        for number in range(PARTITIONS):
            part = _caused(frame.filter(pl.Series(chosen == number)), kind, number)
            part = part.select([one["name"] for one in topic.record["fields"]])
            values = encoder.encode(part)
            await producer.send([Outbound(topic.name, number, [b"k"] * len(values), values)])
            place = [
                pl.Series("_partition", np.full(part.height, number), dtype=pl.Int32),
                pl.Series("_position", np.arange(part.height)),
                part["occurred_at"].alias("_appended_at"),
            ]
            parts.append(part.hstack(place))
        self.frames[kind] = pl.concat(parts).sort("occurred_at", maintain_order=True)
        newest_us = int(self.frames[kind]["occurred_at"].to_physical()[-1])
        self.until_us = max(self.until_us, (newest_us // _DAY_US + 1) * _DAY_US)
        self._write(topic.name, self.frames[kind])

    def _write(self, topic: str, rows: pl.DataFrame) -> None:
        definition = self.definition.of_topic(topic)[-1]
        catalog = open_catalog(self.settings)
        ensure(catalog, definition, table_columns(definition, self.catalogue.topic(topic)))
        for start in range(0, rows.height, COMMIT):
            part = rows[start : start + COMMIT]
            held = rows[: start + COMMIT].group_by("_partition").agg(pl.col("_position").max())
            progress = {
                number: PartitionProgress(1, position) for number, position in held.iter_rows()
            }

            def decide(
                table: Table, before: TableProgress, part: pl.DataFrame = part, at: Any = progress
            ) -> Change:
                files = write(table, part)
                self.files += len(files)
                return Change(before.having(at), files)

            commit(catalog, definition.identifier, decide)
        catalog.close()

    def find(self, topic: str) -> LakePast | None:
        """What the lake holds."""
        with Lake(open_catalog(self.settings), self.definition) as lake:
            return past_in(lake, self.catalogue.topic(topic))

    def cuts(self, view: FeatureView, partition: int) -> dict[int, int]:
        """The ends of the log."""
        topic = f"events.{view.event_type}"
        numbers = [partition] if view.placement == "partitioned" else range(PARTITIONS)
        return {k: len(self.bus.log(topic, k).values) - 1 for k in numbers}

    async def backfilled(self, views: Sequence[FeatureView], lake: bool) -> int:
        """Compute all pasts; returns how many events went into all states."""
        log = LogPast(self.bus, self.catalogue, Decoder(self.registry))
        history = Pasts(self.catalogue, log, self.find if lake else None)
        events = 0
        for topic in sorted({f"events.{view.event_type}" for view in views}):
            orders = [
                Order(view, partition, self.cuts(view, partition), self.until_us)
                for view in views
                if f"events.{view.event_type}" == topic
                for partition in range(PARTITIONS)
            ]
            made = await history.compute(orders, lambda percent: None)
            events += sum(one.events for one in made)
        return events

    def counted(self, views: Sequence[FeatureView]) -> int:
        """The same by a recount."""
        events = 0
        for view in views:
            rows = self.frames[view.event_type].drop_nulls(list(view.entity))
            since = Order(view, 0, {}, self.until_us).from_us
            if since is not None:
                rows = rows.filter(pl.col("occurred_at").to_physical() >= since)
            events += rows.height * (PARTITIONS if view.placement == "broadcast" else 1)
        return events


def measured(year: Year, views: Sequence[FeatureView], lake: bool) -> Figures:
    """One run."""
    began, cpu = time.monotonic(), time.process_time()
    events, held_ms = asyncio.run(_beside(year.backfilled(views, lake)))
    figures = {
        "events": float(events),
        "loop_held_p99_ms": float(np.percentile(held_ms, 99)),
        "loop_held_most_ms": max(held_ms),
        "cpu_seconds": time.process_time() - cpu,
        "seconds": time.monotonic() - began,
    }
    if events != year.counted(views):
        raise RuntimeError(f"{events} events are in the states, not {year.counted(views)}")
    return {**figures, "events_per_second": events / figures["seconds"]}


async def _beside(work: Coroutine[Any, Any, int]) -> tuple[int, list[float]]:
    """The work's result, and how much later than it should something else in the loop went on."""
    held_ms: list[float] = []

    async def tick() -> None:
        while True:
            began = time.monotonic()
            await asyncio.sleep(_TICK_S)
            held_ms.append((time.monotonic() - began - _TICK_S) * 1e3)

    ticking = asyncio.create_task(tick())
    result = await work
    ticking.cancel()
    return result, held_ms


def _caused(frame: pl.DataFrame, kind: str, number: int) -> pl.DataFrame:
    count = frame.height
    origin = pl.Struct({"topic": pl.String, "partition": pl.Int32, "position": pl.Int64})
    cause = pl.DataFrame(
        {
            "topic": pl.repeat(f"inbox.{kind}", count, dtype=pl.String, eager=True),
            "partition": np.full(count, number, dtype=np.int32),
            "position": np.arange(count),
            "index": np.zeros(count, dtype=np.int32),
            "origin": pl.Series([None] * count, dtype=origin),
        }
    )
    return frame.with_columns(cause.to_struct("cause"))


def _told(one: Figures) -> str:
    held = (
        f"the loop held {one['loop_held_p99_ms']:.0f} ms p99, {one['loop_held_most_ms']:.0f} most"
    )
    return f"{one['seconds']:.1f} s ({one['cpu_seconds']:.1f} CPU; {held})"


def main(asked_for: Sequence[str] | None = None) -> None:
    """Measure and save."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--months", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dry", action="store_true", help="print, save nothing")
    asked = parser.parse_args(asked_for)
    collect_seldom()  # as every service does
    folder = Path(tempfile.mkdtemp(prefix="causemesh-backfill-"))
    try:
        year = Year(folder, asked.months)
        print(f"{sum(map(len, year.frames.values())):,} records, {year.files:,} files", flush=True)
        example = parse_views(yaml.safe_load((PROJECT / "features.yaml").read_text()))
        made: list[tuple[str, Callable[[], Figures]]] = [
            ("year", partial(measured, year, year_views(), True)),
            ("year, from the log alone", partial(measured, year, year_views(), False)),
            ("example", partial(measured, year, example, True)),
        ]
        arms = [Arm(name, run, rate="events_per_second") for name, run in made]
        found = rounds(arms, asked.rounds)
        records = sum(map(len, year.frames.values()))
    finally:
        shutil.rmtree(folder)
    show(arms, found)
    for arm in arms:
        told = ", ".join(map(_told, found[arm.name]))
        print(f"{arm.name}: {told}")
    if not asked.dry:
        about = {"records": records, "files": year.files, "partitions": PARTITIONS}
        save(
            "backfill",
            {"arms": table(arms, found)},
            about=about,
            of=versions("polars", "pyarrow", "pyiceberg", "numpy"),
        )


if __name__ == "__main__":
    main()
