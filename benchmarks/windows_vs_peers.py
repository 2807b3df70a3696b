"""Windowed aggregates a second: the features service beside Kafka Streams, Quix Streams and Faust.

usage: python -m benchmarks.windows_vs_peers [--rounds 3] [--records 1800000] [--sensors 100000]

All read the same topic of Avro readings from the same broker: six hours of event time, in order. By
sensor they keep count, sum, mean, min, max, std, first and last over one, two and three hours. What
an arm then says of the windows that the last record is in must be what the readings say, for every
sensor, or there is no result.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import yaml

from benchmarks.harness import (
    PEER_PYTHON,
    Arm,
    Figures,
    peer_versions,
    rated,
    rounds,
    run_command,
    save,
    show,
    table,
    versions,
)
from benchmarks.peers.kafka_streams import build
from benchmarks.readings import HOUR_US, PROJECT, READINGS, START_US, Filled, Place, frames, place
from causemesh.local.artefacts import KAFKA

_HOME = Path(".causemesh-bench-windows")
_PEERS = Path(__file__).parent / "peers"
_SPAN_HOURS = 6
HOURS = (1, 2, 3)
EXACT = ("count", "sum", "min", "max", "first", "last")
ROUNDED = ("mean", "std")
_AGGREGATES = ("count", "sum", "mean", "min", "max", "std", "first", "last")
VIEWS = {
    "views": {
        "sensor_windows": {
            "event": "reading",
            "entity": "sensor",
            "scope": "shared",
            "windows": [f"{hours}h" for hours in HOURS],
            "features": {"value": list(_AGGREGATES)},
            "tile": "5m",
        }
    }
}


def expected(readings: pl.DataFrame) -> pl.DataFrame:
    """The aggregates by sensor of the windows that the last reading is in, from the readings.

    Columns: key, hours and the eight. Sums of squares are exact: values are whole 1024ths.
    """
    newest_us = readings["at_us"].to_numpy()[-1]
    found = []
    for hours in HOURS:
        start_us = newest_us // (hours * HOUR_US) * hours * HOUR_US
        units = (pl.col("value") * 1024).cast(pl.Int64)
        found.append(
            readings.filter(pl.col("at_us") >= start_us)
            .group_by("key")
            .agg(
                count=pl.len().cast(pl.Float64),
                sum=pl.col("value").sum(),
                mean=pl.col("value").mean(),
                min=pl.col("value").min(),
                max=pl.col("value").max(),
                std=(pl.len() * (units * units).sum() - units.sum() ** 2).cast(pl.Float64).sqrt()
                / pl.len()
                / 1024,
                first=pl.col("value").first(),
                last=pl.col("value").last(),
            )
            .with_columns(hours=pl.lit(hours, pl.Int64))
        )
    return pl.concat(found)


def answers_of_vectors(path: Path) -> pl.DataFrame:
    """Our vectors in the form of `expected`: an empty window is left out, as peers have none."""
    wide = pl.read_parquet(path)
    found = [
        wide.select(
            "key",
            *(pl.col(f"value_{one}_{hours}h").cast(pl.Float64).alias(one) for one in _AGGREGATES),
            hours=pl.lit(hours, pl.Int64),
        ).filter(pl.col("count") > 0)
        for hours in HOURS
    ]
    return pl.concat(found)


def answers_of_peer(path: Path) -> pl.DataFrame:
    """A peer's result file in the form of `expected`."""
    numbers = dict.fromkeys(_AGGREGATES, pl.Float64)
    schema = {"key": pl.String, "hours": pl.Int64, **numbers}
    return pl.read_csv(path, schema_overrides=schema)


def check(answers: pl.DataFrame, truth: pl.DataFrame) -> None:
    """Raises RuntimeError unless both say the same of the same windows.

    Whole 1024ths must be equal bit for bit, as float32; means and deviations, which arms divide
    and root in their own order, to one part in a million.
    """
    both = truth.join(answers, on=["key", "hours"], how="full", suffix="_found")
    if not truth.height == answers.height == both.height:
        raise RuntimeError(
            f"{answers.height} windows answered, {truth.height} expected, {both.height} in either"
        )
    for name in (*EXACT, *ROUNDED):
        want = both[name].cast(pl.Float32).to_numpy()
        found = both[f"{name}_found"].cast(pl.Float32).to_numpy()
        rough = {"rtol": 1e-6, "atol": 1e-5} if name in ROUNDED else {"rtol": 0, "atol": 0}
        wrong = np.flatnonzero(~np.isclose(found, want, **rough))
        if len(wrong):
            raise RuntimeError(f"{name} is wrong in {len(wrong)} windows: {both[int(wrong[0])]}")


class Work:
    """A filled topic, and what its first readings say."""

    def __init__(self, where: Place, filled: Filled, sensors: int) -> None:
        self.where, self.filled = where, filled
        parts = [
            frame.select(
                pl.col("sensor").alias("key"), "value", at_us=pl.col("occurred_at").to_physical()
            )
            for frame in frames(filled.count, sensors, _SPAN_HOURS)
        ]
        self._readings = pl.concat(parts)

    def ours(self, warm: int, more: dict[str, str]) -> Figures:
        """The features service, from an empty database."""
        asyncio.run(self.where.fresh_database("features"))
        with _result("parquet") as result:
            # one more: the promise on the requests' topic
            told = [str(START_US + _SPAN_HOURS * HOUR_US), result, self.filled.in_log + 1, warm]
            argv = [sys.executable, "-m", "benchmarks.windows_run", *map(str, told)]
            publishing = {"CAUSEMESH_PUBLISH_VECTORS": "false"}
            figures = run_command(argv, {**self.where.environment(), **publishing, **more})
            check(answers_of_vectors(result), expected(self._readings))
        return rated(figures)

    def kafka_streams(self, warm: int, commit_ms: int) -> Figures:
        """Kafka Streams, one stream thread."""
        with tempfile.TemporaryDirectory() as state, _result("csv") as result:
            told = [self.filled.count, warm, commit_ms, state, result]
            command = [*build.command("WindowAggregates"), *self._told(), *map(str, told)]
            figures = run_command(command)
            check(answers_of_peer(result), expected(self._readings))
        return rated(figures)

    def python_peer(self, script: str, count: int, warm: int) -> Figures:
        """A Python peer over the first `count` readings."""
        with tempfile.TemporaryDirectory() as state, _result("csv") as result:
            told = [*self._told(), *map(str, [count, warm, state, result])]
            figures = run_command([PEER_PYTHON, _PEERS / script, *told])
            check(answers_of_peer(result), expected(self._readings[:count]))
        return rated(figures)

    def _told(self) -> list[str]:
        schema = str(self.where.schema_file())
        return [
            self.where.endpoints.kafka_bootstrap, READINGS, schema, str(self.filled.schema_id),
        ]  # fmt: skip


@contextmanager
def _result(suffix: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / f"result.{suffix}"


def arms(work: Work) -> list[Arm]:
    """All sides. The slower peers read a part, each long enough for several seconds."""
    count = work.filled.count
    warm, few, fewer = count // 6, count // 12, count // 100
    every_30_s = {"CAUSEMESH_COMMIT_EVERY_S": "30", "CAUSEMESH_COMMIT_EVERY_UNITS": "1000000"}
    return [
        Arm(
            "causemesh features",
            partial(work.ours, warm, {}),
            {"checkpoint": "state and position every 20 units (as it comes)", "tile": "5 minutes"},
        ),
        Arm(
            "causemesh features, commit each 30 s",
            partial(work.ours, warm, every_30_s),
            {"checkpoint": "every 30 s, as Kafka Streams as it comes", "tile": "5 minutes"},
        ),
        Arm(
            "Kafka Streams, RocksDB",
            partial(work.kafka_streams, warm, 30_000),
            {
                "cache": "256 MiB",
                "changelog": "lz4, linger 100 ms",
                "commit": "every 30 s (as it comes)",
                "fetch": "4 MiB, 10,000 records a poll, 20,000 buffered",
                "heap": "1 GiB",
            },
        ),
        Arm(
            "Quix Streams",
            partial(work.python_peer, "quix_windows.py", few, few // 6),
            {
                "state": "RocksDB, changelog lz4",
                "commit": "every 5 s (as it comes)",
                "records": few,
            },
        ),
        Arm(
            "Faust",
            partial(work.python_peer, "faust_windows.py", fewer, fewer // 6),
            {"state": "memory, changelog lz4", "records": fewer},
        ),
    ]


def project(folder: Path) -> Path:
    """The benchmarks' project with the measured view."""
    made = Path(shutil.copytree(PROJECT, folder / "project"))
    (made / "features.yaml").write_text(yaml.safe_dump(VIEWS))
    return made


def main() -> None:
    """Fill a topic, run the rounds, write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--records", type=int, default=1_800_000)
    parser.add_argument("--sensors", type=int, default=100_000)
    parser.add_argument("--only", help="arms whose name contains this; nothing is written")
    told = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        place(_HOME, project=project(Path(folder))) as where,
    ):
        filled = asyncio.run(where.fill(told.records, told.sensors, _SPAN_HOURS))
        work = Work(where, filled, told.sensors)
        chosen = [arm for arm in arms(work) if (told.only or "") in arm.name]
        found = rounds(chosen, told.rounds)
    show(chosen, found)
    if told.only is None:
        of: dict[str, Any] = {
            **versions("polars", "aiokafka", "numpy"),
            "java": build.java_version(),
            **build.VERSIONS,
            **peer_versions("quixstreams", "faust-streaming", "confluent-kafka", "fastavro"),
            "kafka": KAFKA,
        }
        about = {"readings": told.records, "sensors": told.sensors, "rounds": told.rounds}
        save("windows", {"arms": table(chosen, found)}, about=about, of=of)


if __name__ == "__main__":
    main()
