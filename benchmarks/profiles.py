"""Where the time of features, inference and billing goes under load: py-spy, as flame graphs.

usage: python -m benchmarks.profiles

Writes docs/profiles/<service>.svg and, beside the other results, the share of each part of the
work.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.flamegraph import folded, svg
from benchmarks.harness import PEER_PYTHON, ROOT, peer_versions, run_command, save
from benchmarks.predictions_vs_peers import Bench
from benchmarks.readings import Place, place

PROFILES = ROOT / "docs" / "profiles"
_HOME = Path(".causemesh-bench-profiles")
_SERVERS = ("kafka", "registry", "postgres", "triton")
_READINGS, _SENSORS, _TASKS = 4_000_000, 10_000, 400_000
_STARTED_S, _RECORDED_S, _RATE = 1.0, 12, 150
_IMPORTING = "_find_and_load (<frozen importlib._bootstrap>)"  # a start is no work
_GROUPS = {"features": "features", "billing": "billing", "inference": "inference-realtime"}

# The first of these that is anywhere in a stack is what the sample counts for.
_TAKEN_IN = (
    ("decode", "Decoder.decode (causemesh/codec/decode.py)"),
    ("decode", "(causemesh/codec/log_block.py)"),
    ("drop replays", "HighWaterMarks.fresh (causemesh/runner/marks.py)"),
)
_SENT = (
    ("send: causes and ids", "_with_envelope (causemesh/runner/emitter.py)"),
    ("send: encode", "(causemesh/codec/encode.py)"),
    ("send: record batches", "(aiokafka/producer/"),
    ("send: record batches", "PartitionQueue._write (causemesh/bus/kafka_producer.py)"),
    ("send: the rest", "Emitter.send (causemesh/runner/emitter.py)"),
)
_FETCHED = (
    ("fetch", "KafkaReader.fetch (causemesh/bus/kafka_reader.py)"),
    ("fetch", "(causemesh/bus/record_blocks.py)"),
    ("fetch", "(causemesh/bus/kafka_fetch.py)"),
    ("network and event loop", "(aiokafka/"),
)
PARTS: Mapping[str, Sequence[tuple[str, str]]] = {
    "features": (
        ("state: snapshot and commit", "PartitionWorker._checkpoint"),
        ("state: snapshot and commit", "_SqlUnit.commit"),
        *_TAKEN_IN,
        ("read events by the view", "Join._read (services/features/handlers.py)"),
        ("state: find entities", "PartitionState.add_view_events"),
        ("state: apply", "PartitionState.advance"),
        ("choose vectors to publish", "(services/features/publishing.py)"),
        *_SENT,
        *_FETCHED,
    ),
    "billing": (
        *_TAKEN_IN,
        ("meter", "Metering._metered (services/billing/handlers.py)"),
        ("lateness", "(services/billing/lateness.py)"),
        ("Postgres", "(sqlalchemy/"),
        ("Postgres", "(asyncpg/"),
        *_SENT,
        *_FETCHED,
    ),
    "inference": (
        *_TAKEN_IN,
        ("model calls", "Predict._call (services/inference/handlers.py)"),
        ("model calls", "(grpc/"),
        ("outcomes", "(services/inference/"),
        *_SENT,
        *_FETCHED,
    ),
}


def recorded(argv: list[str], environment: Mapping[str, str]) -> dict[str, int]:
    """The folded stacks of a service while it works."""
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "stacks"
        recorders: list[threading.Thread] = []

        def record(pid: int) -> None:
            time.sleep(_STARTED_S)
            told = ["record", "--pid", str(pid), "--duration", str(_RECORDED_S), "--function"]
            more = ["--rate", str(_RATE), "--format", "raw", "--output", str(raw)]
            spy = PEER_PYTHON.with_name("py-spy")
            subprocess.run([spy, *told, *more], check=False, capture_output=True)

        def beside(pid: int) -> None:
            recorders.append(threading.Thread(target=record, args=(pid,)))
            recorders[0].start()

        run_command(argv, environment, beside)
        recorders[0].join()
        stacks = folded(raw.read_text().splitlines())
        return {stack: count for stack, count in stacks.items() if _IMPORTING not in stack}


def shares(service: str, stacks: Mapping[str, int]) -> dict[str, float]:
    """The share of each part, by the samples under its functions; the rest is "other"."""
    counted: dict[str, int] = {}
    for stack, samples in stacks.items():
        part = next((name for name, sign in PARTS[service] if sign in stack), "other")
        counted[part] = counted.get(part, 0) + samples
    whole = sum(counted.values())
    ordered = sorted(counted.items(), key=lambda one: -one[1])
    return {name: round(samples / whole, 3) for name, samples in ordered}


def profiled(where: Place, service: str, records: int) -> dict[str, Any]:
    """Run a service over what waits for it, and draw it."""
    argv = [sys.executable, "-m", "benchmarks.service_run", service, "--group", _GROUPS[service]]
    stacks = recorded([*argv, "--records", str(records), "--warm", "1"], where.environment())
    PROFILES.mkdir(exist_ok=True)
    picture = svg(stacks, f"{service} under load")
    (PROFILES / f"{service}.svg").write_text(picture)
    samples = sum(stacks.values())
    print(service, samples, shares(service, stacks), f"{len(picture):,} bytes", flush=True)
    return {"service": service, "samples": samples, "parts": shares(service, stacks)}


def main() -> None:
    """Profile all three, write the results."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    with place(_HOME, _SERVERS) as where, tempfile.TemporaryDirectory() as folder:
        filled = asyncio.run(where.fill(_READINGS, _SENSORS))
        bench = Bench(where, Path(folder), _TASKS)
        asyncio.run(bench.load())
        asyncio.run(bench.fill())
        asyncio.run(bench.register())
        found = [
            profiled(where, "features", filled.in_log + 1),
            profiled(where, "billing", filled.in_log),
            profiled(where, "inference", _TASKS),
        ]
    about = {"readings": _READINGS, "tasks": _TASKS, "samples a second": _RATE}
    save("profiles", {"services": found}, about=about, of=peer_versions("py-spy"))


if __name__ == "__main__":
    main()
