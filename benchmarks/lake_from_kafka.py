"""How fast one process writes a topic to the lake, from the broker to committed snapshots.

usage: python -m benchmarks.lake_from_kafka [--records 2000000] [--rounds 3]

`lake_writing` starts from fetched bytes; here the writer runs as it ships: it reads the embedded
Kafka, decodes by column, drops replays, and commits Iceberg snapshots of 200,000 rows whose catalog
is in Postgres. Every record must be in the table once, or there is no result.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import sys
from pathlib import Path

from benchmarks.harness import (
    Arm,
    Figures,
    rated,
    rounds,
    run_command,
    save,
    show,
    table,
    versions,
)
from benchmarks.readings import PROJECT, READINGS, Filled, Place, place
from causemesh.catalogue import LAKE
from causemesh.lake.reading import Lake
from causemesh.lake.settings import lake_settings
from causemesh.local.artefacts import KAFKA

_HOME = Path(".causemesh-bench-lake")


def written(where: Place, filled: Filled, more: dict[str, str]) -> Figures:
    """The writer from an empty catalog and an empty warehouse."""
    asyncio.run(where.fresh_database(LAKE))
    shutil.rmtree(where.home / "lake", ignore_errors=True)
    environment = {**where.environment(), "CAUSEMESH_LAKE_UPKEEP_SECONDS": "0", **more}
    told = [READINGS, str(filled.count), str(filled.in_log - 1)]
    figures = run_command([sys.executable, "-m", "benchmarks.lake_run", *told], environment)
    with Lake.open(lake_settings(environment), where.catalogue, PROJECT) as lake:
        found = lake.select(READINGS).lazy().select("_position").collect()["_position"]
    if len(found) != filled.count or found.n_unique() != filled.count:
        raise RuntimeError(f"{len(found)} rows of {filled.count} records are in the table")
    return rated(figures)


def main() -> None:
    """Fill a topic, run the rounds, write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--records", type=int, default=2_000_000)
    parser.add_argument("--sensors", type=int, default=10_000)
    parser.add_argument("--dry", action="store_true", help="print, save nothing")
    told = parser.parse_args()
    with place(_HOME) as where:
        filled = asyncio.run(where.fill(told.records, told.sensors))
        arms = [
            Arm(
                "causemesh lake writer",
                lambda: written(where, filled, {}),
                {"snapshot": "each 200,000 rows (as it comes)", "tenants": 100, "files": "zstd"},
            )
        ]
        found = rounds(arms, told.rounds)
    show(arms, found)
    if not told.dry:
        about = {"readings": told.records, "rounds": told.rounds}
        of = {**versions("polars", "pyarrow", "pyiceberg", "aiokafka"), "kafka": KAFKA}
        save("lake_from_kafka", {"arms": table(arms, found)}, about=about, of=of)


if __name__ == "__main__":
    main()
