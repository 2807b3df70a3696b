"""Events a second through a transform: ours, which Faust runs, beside Faust alone.

usage: python -m benchmarks.transforms_vs_faust [--rounds 3] [--events 60000] [--sensors 1000]

All read the same topic of Avro readings from the same broker, keep count and total by sensor in a
table, and make one event of each. Tables and events must sum to exactly what was written, or there
is no result.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import shutil
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import fastavro
import polars as pl
import yaml

from benchmarks.harness import Arm, Figures, rated, rounds, run_command, save, show, table, versions
from benchmarks.readings import PROJECT, READINGS, Filled, Place, place
from causemesh.bus.kafka import KafkaBus
from causemesh.catalogue import Catalogue
from causemesh.cli.running import settings_on
from causemesh.codec.decode import Decoder
from causemesh.codec.registry import HttpRegistry
from causemesh.local.artefacts import KAFKA
from causemesh.log import LogReader
from causemesh.provision import provision

_HOME = Path(".causemesh-bench-transforms")
_PEER = Path(__file__).parent / "peers" / "faust_transform.py"
_FIELDS = [
    {"name": "sensor", "type": "string"},
    {"name": "count", "type": "long"},
    {"name": "total", "type": "double"},
]
RECORD = {"type": "record", "name": "Totalled", "namespace": "benchmarks", "fields": _FIELDS}
FUNCTION = '''
async def totalled(event, table):
    """Count and total of a sensor, after each reading of it."""
    table["count"] = table.get("count", 0) + 1
    table["total"] = table.get("total", 0.0) + event["value"]
    yield {"sensor": event["sensor"], "count": table["count"], "total": table["total"]}
'''


def project(folder: Path, name: str) -> Path:
    """The benchmarks' project with a transform, which makes the event type `name`."""
    made = folder / "project"
    shutil.copytree(PROJECT, made)
    catalogue = yaml.safe_load((PROJECT / "catalogue.yaml").read_text())
    told: dict[str, Any] = {"file": "transforms/totalled.py", "function": "totalled"}
    told |= {"inputs": ["reading"], "by": "sensor", "scope": "shared"}
    catalogue["event_types"][name] = {"record": "Totalled", "key": "sensor", "transform": told}
    (made / "catalogue.yaml").write_text(yaml.safe_dump(catalogue, sort_keys=False))
    (made / "events" / "Totalled.avsc").write_text(json.dumps(RECORD))
    (made / "transforms").mkdir()
    (made / "transforms" / "totalled.py").write_text(FUNCTION)
    return made


def ours(where: Place, filled: Filled) -> Figures:
    """The transforms' process as it ships, with topics of its own and an empty database."""
    asyncio.run(where.fresh_database("features"))
    name = f"totalled_{time.time_ns()}"
    with tempfile.TemporaryDirectory() as folder:
        made = project(Path(folder), name)
        asyncio.run(provision(settings_on(where.endpoints, made, "kafka", 1)))
        environment = {**where.environment(), "CAUSEMESH_PROJECT": str(made)}
        argv = [sys.executable, "-m", "benchmarks.transforms_run", str(filled.count)]
        figures = run_command(argv, environment)
        catalogue = Catalogue.load([made], partitions=1)
    transform = catalogue.transforms[name]
    made_events, rows = asyncio.run(written(where, catalogue, transform.output, transform.state))
    whole(made_events.select("sensor", "count", "total"), filled)
    # of a sensor's rows the last counts; a partition's own row, which has no table, is not one
    last = rows.filter(pl.col("key").bin.starts_with(b"s")).group_by("key").last()
    tables = [json.loads(value) for value in last["value"]]
    stored = {name: sum(one[name] for one in tables) for name in ("count", "total")}
    return checked({**figures, "count": stored["count"], "sum": stored["total"]}, filled)


async def written(where: Place, catalogue: Catalogue, *topics: str) -> list[pl.DataFrame]:
    """The records of topics with their keys, as any reader of the mesh has them."""
    bus, registry = (
        KafkaBus(where.endpoints.kafka_bootstrap),
        HttpRegistry(where.endpoints.registry_url),
    )
    reader = LogReader(bus, catalogue, Decoder(registry))
    try:
        found = []
        for topic in topics:
            frames = [
                batch.frame.with_columns(
                    pl.Series("key", [batch.raw.keys[row] for row in batch.rows], pl.Binary)
                )
                async for batch in reader.read(await reader.ends([topic]))
            ]
            found.append(pl.concat(frames))
        return found
    finally:
        await registry.close()
        await bus.close()


def faust_alone(where: Place, filled: Filled, *, regroup: bool) -> Figures:
    """A plain Faust app."""
    output = f"faust-totalled-{time.time_ns()}"
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "totalled.avsc"
        record.write_text(json.dumps(RECORD))
        argv: list[str | Path] = [
            *(sys.executable, _PEER, where.endpoints.kafka_bootstrap, READINGS),
            *(where.schema_file(), str(filled.schema_id), record, output),
            *(str(filled.count), "1" if regroup else "0", folder),
        ]
        figures = run_command(argv)
    whole(asyncio.run(bare(where, output, filled.count)), filled)
    return checked(figures, filled)


async def bare(where: Place, topic: str, count: int) -> pl.DataFrame:
    """What Faust wrote, which no registry knows; at least `count` records."""
    schema: Any = fastavro.parse_schema(dict(RECORD))
    bus = KafkaBus(where.endpoints.kafka_bootstrap)
    reader = bus.reader({(topic, 0): -1})
    rows: list[Any] = []
    try:
        while True:
            fetched = await reader.fetch(20_000, 1.0)
            for raw in fetched:
                rows += [fastavro.schemaless_reader(io.BytesIO(one), schema, None)
                         for one in raw.values if one is not None]  # fmt: skip
            if not fetched and len(rows) >= count:
                return pl.DataFrame(rows)
    finally:
        await reader.close()
        await bus.close()


def whole(events: pl.DataFrame, filled: Filled) -> None:
    """Raises RuntimeError unless there is one event a reading, and the last of each sensor holds
    all of its readings."""
    last = events.sort("count").group_by("sensor").last()
    told = (events.height, events.n_unique(), int(last["count"].sum()), float(last["total"].sum()))
    if told != (filled.count, filled.count, filled.count, filled.total()):
        raise RuntimeError(f"the events are {told}; written were {filled.count}, {filled.total()}")


def checked(figures: Figures, filled: Filled) -> Figures:
    """The figures without the proof. Raises RuntimeError when tables lack or double a reading."""
    if (figures["count"], figures["sum"]) != (filled.count, filled.total()):
        raise RuntimeError(f"the tables sum to {figures}; written were {filled.count} readings")
    return rated({name: figures[name] for name in figures.keys() - {"count", "sum"}})


def arms(where: Place, filled: Filled) -> list[Arm]:
    """All sides."""
    lz4 = "memory, changelog lz4"
    return [
        Arm(
            "causemesh transforms",
            partial(ours, where, filled),
            {"stored": "outputs, then tables and position, every 500 events at most (as it comes)"},
        ),
        Arm(
            "Faust",
            partial(faust_alone, where, filled, regroup=False),
            {"state": lz4, "commit": "offsets every 2.8 s (as it comes)"},
        ),
        Arm(
            "Faust, brought together by key first",
            partial(faust_alone, where, filled, regroup=True),
            {"state": lz4, "commit": "offsets every 2.8 s (as it comes)", "agents": 2},
        ),
    ]


def main() -> None:
    """Fill a topic, run the rounds, write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--events", type=int, default=60_000)
    parser.add_argument("--sensors", type=int, default=1_000)
    parser.add_argument("--only", help="arms whose name contains this; nothing is written")
    told = parser.parse_args()
    with place(_HOME) as where:
        filled = asyncio.run(where.fill(told.events, told.sensors))
        chosen = [arm for arm in arms(where, filled) if (told.only or "") in arm.name]
        found = rounds(chosen, told.rounds)
    show(chosen, found)
    if told.only is None:
        about = {"events": told.events, "sensors": told.sensors, "rounds": told.rounds}
        mine = versions("faust-streaming", "aiokafka", "fastavro")
        save("transforms", {"arms": table(chosen, found)}, about=about, of={**mine, "kafka": KAFKA})


if __name__ == "__main__":
    main()
