"""How fast one process writes a topic to the lake, beside a bound and a writer row by row.

usage: python -m benchmarks.lake_writing [--records 600000] [--rounds 3]

All arms get the same framed Avro records in memory, in units of 20,000, of 10 tenants on one day:

- lake: what the service does with a fetched batch: decode by column, marks, rows, and one Iceberg
  snapshot for each 200,000 records, with its position;
- bound: the decoded columns are there already; pyarrow writes them as one Parquet file for each
  200,000 records, and nothing else;
- rows: fastavro decodes record by record; pyiceberg's own `append` writes them, as often, to a
  table without partitions.

Figures go by processor time of the whole process, threads included: the machine may be shared.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fastavro
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.harness import Arm, Figures, rated, rounds, save, show, table, versions
from causemesh.bus.base import RawBatch
from causemesh.catalogue import LAKE, WATERMARK, Catalogue
from causemesh.clock import SystemClock
from causemesh.codec.decode import Decoder, plain
from causemesh.codec.encode import RegistryEncoders
from causemesh.codec.registry import MemoryRegistry
from causemesh.codec.wire import HEADER_BYTES
from causemesh.lake.definitions import LakeDefinition, define_lake
from causemesh.lake.opening import open_catalog
from causemesh.lake.settings import LakeSettings
from causemesh.positions import Checkpoint
from causemesh.runner.intake import Intake
from causemesh.runner.marks import HighWaterMarks
from causemesh.runner.watermarks import WatermarkTracker
from services.features.lake.decoding import WidestDecoder
from services.features.lake.store import FlushLimits, LakeStore
from services.features.lake.writing import LakeWriter

PROJECT = Path(__file__).parents[1] / "examples" / "flights"
TOPIC = "events.flight_departed"
UNIT, COMMIT, TENANTS = 20_000, 200_000, 10
_START_US = 1_356_998_400_000_000


def departures(count: int) -> pl.DataFrame:
    """Made-up departures with the fields of real ones."""
    random = np.random.default_rng(1)
    numbers = np.arange(count)
    at = pl.Series(_START_US + numbers * (86_000_000_000 // count)).cast(pl.Datetime("us", "UTC"))
    return pl.DataFrame(
        {
            "event_id": [f"dep-UA{n % 4000}-20130101-{n}" for n in range(count)],
            "tenant_id": [f"A{n % TENANTS}" for n in range(count)],
            "occurred_at": at,
            "cause": pl.DataFrame(
                {
                    "topic": ["inbox.flight_departed"] * count,
                    "partition": np.zeros(count, dtype=np.int32),
                    "position": numbers,
                    "index": np.zeros(count, dtype=np.int32),
                    "origin": pl.Series(
                        [None] * count,
                        dtype=pl.Struct(
                            {"topic": pl.String, "partition": pl.Int32, "position": pl.Int64}
                        ),
                    ),
                }
            ).to_struct(),
            "flight_id": [f"UA{n % 4000}-20130101-EWR" for n in range(count)],
            "carrier": [f"A{n % TENANTS}" for n in range(count)],
            "origin": ["EWR"] * count,
            "dest": [f"D{n % 100}" for n in range(count)],
            "tail": [f"N{n % 3000}" for n in range(count)],
            "distance_miles": pl.Series(random.integers(90, 4_000, count), dtype=pl.Int32),
            "scheduled_at": at,
            "departure_delay_minutes": pl.Series(random.integers(-20, 300, count), dtype=pl.Int32),
        }
    )


class Work:
    """The records, framed, and a folder for each arm."""

    def __init__(self, count: int) -> None:
        self.catalogue = Catalogue.load([PROJECT], partitions=1)
        self.topic = self.catalogue.topic(TOPIC)
        self.registry = MemoryRegistry()
        self.frame = departures(count).select([one["name"] for one in self.topic.record["fields"]])
        self.values = asyncio.run(self._encoded())
        made = define_lake(self.catalogue, None)
        mine = {name: one for name, one in made.tables.items() if one.topic == TOPIC}
        self.definition = LakeDefinition(mine)

    async def _encoded(self) -> list[bytes]:
        encoder = await RegistryEncoders(self.registry).encoder(
            self.topic.subject, self.topic.record
        )
        return encoder.encode(self.frame)

    def measured(self, arm: Callable[[Path], int]) -> Figures:
        """Run an arm in an empty folder; what it says it wrote must be all."""
        folder = Path(tempfile.mkdtemp(prefix="causemesh-lake-"))
        try:
            began, cpu = time.monotonic(), time.process_time()
            written = arm(folder)
            figures = {
                "records": float(len(self.values)),
                "cpu_seconds": time.process_time() - cpu,
                "seconds": time.monotonic() - began,
            }
            if written != len(self.values):
                raise RuntimeError(f"{written} of {len(self.values)} records are in the table")
            return rated(figures)
        finally:
            shutil.rmtree(folder)

    def raw(self, start: int) -> RawBatch:
        """One fetch."""
        values = self.values[start : start + UNIT]
        positions = np.arange(start, start + len(values), dtype=np.int64)
        appended = np.full(len(values), _START_US, dtype=np.int64)
        return RawBatch(TOPIC, 0, positions, [b"k"] * len(values), values, appended)


def _settings(folder: Path) -> LakeSettings:
    return LakeSettings(catalog=f"sqlite:///{folder}/c.db", warehouse=f"file://{folder}/tables")


def lake(work: Work, folder: Path) -> int:
    """The service's own code from fetched bytes to snapshots."""
    return asyncio.run(_lake(work, folder))


async def _lake(work: Work, folder: Path) -> int:
    catalog = open_catalog(_settings(folder))
    store = LakeStore(
        catalog,
        work.catalogue,
        work.definition,
        {LAKE: (TOPIC,)},
        clock=SystemClock(),
        limits=FlushLimits(rows=COMMIT),
    )
    controls = {WATERMARK: work.catalogue.controls[WATERMARK]}
    catalogue = Catalogue(work.catalogue.topics, work.catalogue.event_types, controls)
    marks, watermarks = HighWaterMarks(), WatermarkTracker({})
    decoder = WidestDecoder(Decoder(work.registry), work.registry)
    intake = Intake(catalogue, decoder, marks, watermarks)
    writer = LakeWriter(work.catalogue, work.definition)
    claim, _ = await store.claim(LAKE, 0)
    flushing = asyncio.create_task(store.run())
    for start in range(0, len(work.values), UNIT):
        raw = work.raw(start)
        batches = await intake.take([raw])
        async with store.unit(claim) as unit:
            await writer.process(batches, 0, unit.transaction)
            at = {(TOPIC, 0): int(raw.positions[-1])}
            await unit.commit(Checkpoint(at, marks.dump(), []))
    flushing.cancel()
    await store.flush()
    (main,) = [one for one in work.definition.tables.values() if not one.aside]
    return int(catalog.load_table(main.identifier).scan().count())


def bound(work: Work, folder: Path) -> int:
    """pyarrow alone, from decoded columns."""
    written = 0
    for start in range(0, work.frame.height, COMMIT):
        rows = work.frame[start : start + COMMIT].to_arrow()
        pq.write_table(rows, folder / f"{start}.parquet", compression="zstd")
        written += rows.num_rows
    return written


def rows(work: Work, folder: Path) -> int:
    """Record by record, and the library's append."""
    catalog = open_catalog(_settings(folder))
    catalog.create_namespace("peer")
    arrow = work.frame.clear().to_arrow().schema
    made = catalog.create_table("peer.departures", schema=arrow)
    schema = fastavro.parse_schema(plain(work.topic.record))
    for start in range(0, len(work.values), COMMIT):
        found: list[Any] = [
            fastavro.schemaless_reader(io.BytesIO(value[HEADER_BYTES:]), schema)
            for value in work.values[start : start + COMMIT]
        ]
        made.append(pa.Table.from_pylist(found, schema=arrow))
    return int(made.scan().count())


def main(told: Sequence[str] | None = None) -> None:
    """Measure and save."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--records", type=int, default=600_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dry", action="store_true", help="print, save nothing")
    asked = parser.parse_args(told)
    work = Work(asked.records)

    def arm(name: str, write: Callable[[Work, Path], int]) -> Arm:
        def run() -> Figures:
            return work.measured(lambda folder: write(work, folder))

        return Arm(name, run, rate="records_per_cpu_second")

    arms = [
        arm("lake", lake),
        arm("bound: pyarrow, decoded", bound),
        arm("rows: fastavro, append", rows),
    ]
    found = rounds(arms, asked.rounds)
    show(arms, found)
    if not asked.dry:
        about = {"records": asked.records, "tenants": TENANTS, "a commit": COMMIT, "a unit": UNIT}
        save(
            "lake",
            {"writing": table(arms, found)},
            about=about,
            of=versions("polars", "pyarrow", "pyiceberg", "fastavro"),
        )


if __name__ == "__main__":
    main()
