"""Feature updates a second: the features service beside Kafka Streams, Quix Streams and Faust.

usage: python -m benchmarks.features_vs_peers [--rounds 5] [--records 900000] [--sensors 10000]

All read the same topic of Avro readings from the same broker, and keep count and sum by sensor over
one hour. An arm's state must sum to exactly what was written, or there is no result.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from functools import partial
from pathlib import Path

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
from benchmarks.readings import PROJECT, READINGS, Filled, Place, place
from causemesh.local.artefacts import KAFKA
from services.features.domain.definitions import FeatureView
from services.features.domain.layout import EVENT, layout_of
from services.features.domain.parsing import parse_views
from services.features.domain.snapshots import unpack, unpack_blobs

_HOME = Path(".causemesh-bench-features")
_PEERS = Path(__file__).parent / "peers"


def checked(figures: Figures, count: int, total: float) -> Figures:
    """The figures without the proof. Raises RuntimeError when records were lost or came twice."""
    if (figures["count"], figures["sum"]) != (count, total):
        raise RuntimeError(f"the state sums to {figures}; written were {count} readings, {total}")
    return rated({name: figures[name] for name in figures.keys() - {"count", "sum"}})


def ours(where: Place, filled: Filled, warm: int, publish: bool) -> Figures:
    """The features service as it ships, from an empty database."""
    asyncio.run(where.fresh_database("features"))
    argv = [sys.executable, "-m", "benchmarks.service_run", "features", "--group", "features"]
    # one more: the promise on the requests' topic
    more = ["--records", str(filled.in_log + 1), "--warm", str(warm)]
    publishing = {"CAUSEMESH_PUBLISH_VECTORS": "true" if publish else "false"}
    figures = run_command([*argv, *more], {**where.environment(), **publishing})
    stored = asyncio.run(stored_state(where))
    return checked({**figures, **stored}, filled.count, filled.total())


async def stored_state(where: Place) -> Figures:
    """Count and sum of the state that was committed."""
    query = "SELECT state FROM checkpoints WHERE group_name = 'features'"
    ((state,),) = await where.sql("features", query)
    partition = unpack_blobs(unpack_blobs(bytes(state), "features")["state"], "partition")
    _, kept = unpack(partition[f"view.{view().id}"], "view")
    places = layout_of(view()).sums
    count = kept["sums"][str(places.index(("count", EVENT)))].sum()
    units = kept["sums"][str(places.index(("sum", 0)))].sum()
    return {"count": float(count), "sum": float(units) * view().resolution}


def view() -> FeatureView:
    """The measured view."""
    return parse_views(yaml.safe_load((PROJECT / "features.yaml").read_text()))[0]


def kafka_streams(where: Place, filled: Filled, warm: int, store: str, commit_ms: int) -> Figures:
    """Kafka Streams, one stream thread."""
    with tempfile.TemporaryDirectory() as state:
        told = [*_told(where, filled), str(filled.count), str(warm), store, str(commit_ms), state]
        figures = run_command([*build.command(), *told])
    return checked(figures, filled.count, filled.total())


def python_peer(where: Place, filled: Filled, script: str, count: int, warm: int) -> Figures:
    """A Python peer over the first `count` readings."""
    with tempfile.TemporaryDirectory() as state:
        settings = [str(count), str(warm), state]
        argv: list[str | Path] = [PEER_PYTHON, _PEERS / script, *_told(where, filled), *settings]
        figures = run_command(argv)
    return checked(figures, count, filled.total(count))


def _told(where: Place, filled: Filled) -> list[str]:
    schema = str(where.schema_file())
    return [where.endpoints.kafka_bootstrap, READINGS, schema, str(filled.schema_id)]


def arms(where: Place, filled: Filled) -> list[Arm]:
    """All sides. The slower peers read a part, each long enough for several seconds."""
    warm = filled.count // 6
    few, fewer = filled.count // 6, filled.count // 60
    streams = {
        "cache": "256 MiB",
        "changelog": "lz4, linger 100 ms",
        "fetch": "4 MiB, 10,000 records a poll, 20,000 buffered",
        "heap": "1 GiB",
    }
    every = "every 30 s (as it comes)"
    return [
        Arm(
            "causemesh features",
            partial(ours, where, filled, warm, False),
            {
                "unit": "at most 20,000 records (as it comes)",
                "checkpoint": "state and position to Postgres every 20 units (as it comes)",
            },
        ),
        Arm(
            "causemesh features, publishing each vector",
            partial(ours, where, filled, warm, True),
            {"published": "every entity's vector to a topic, once a second (as it comes)"},
        ),
        Arm(
            "Kafka Streams, in memory",
            partial(kafka_streams, where, filled, warm, "memory", 30_000),
            {**streams, "commit": every},
        ),
        Arm(
            "Kafka Streams, RocksDB",
            partial(kafka_streams, where, filled, warm, "rocksdb", 30_000),
            {**streams, "commit": every},
        ),
        Arm(
            "Kafka Streams, in memory, commit each 2 s",
            partial(kafka_streams, where, filled, warm, "memory", 2_000),
            {**streams, "commit": "every 2 s, about as often as ours"},
        ),
        Arm(
            "Quix Streams",
            partial(python_peer, where, filled, "quix_features.py", few, few // 6),
            {
                "state": "RocksDB, changelog lz4",
                "commit": "every 5 s (as it comes)",
                "records": few,
            },
        ),
        Arm(
            "Faust",
            partial(python_peer, where, filled, "faust_features.py", fewer, fewer // 6),
            {"state": "memory, changelog lz4", "records": fewer},
        ),
    ]


def main() -> None:
    """Fill a topic, run the rounds, write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--records", type=int, default=900_000)
    parser.add_argument("--sensors", type=int, default=10_000)
    parser.add_argument("--only", help="arms whose name contains this; nothing is written")
    told = parser.parse_args()
    with place(_HOME) as where:
        filled = asyncio.run(where.fill(told.records, told.sensors))
        chosen = [arm for arm in arms(where, filled) if (told.only or "") in arm.name]
        found = rounds(chosen, told.rounds)
    show(chosen, found)
    if told.only is None:
        about = {"readings": told.records, "sensors": told.sensors, "rounds": told.rounds}
        mine = versions("polars", "aiokafka", "numpy")
        java = {"java": build.java_version(), **build.VERSIONS}
        theirs = peer_versions("quixstreams", "faust-streaming", "confluent-kafka", "fastavro")
        save(
            "features",
            {"arms": table(chosen, found)},
            about=about,
            of={**mine, **java, **theirs, "kafka": KAFKA},
        )


if __name__ == "__main__":
    main()
