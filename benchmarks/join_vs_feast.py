"""A join of 100 requests by 50 features: features beside Feast's online stores.

usage: python -m benchmarks.join_vs_feast [--rounds 3] [--joins 1000] [--entities 10000]

Ours computes the features from tiles in this process; Feast's own `get_online_features` looks up
the same numbers, that were computed by us, in SQLite and in Redis. Each answer of each arm is
compared with them. `redis-server` (Debian's) must be in the path for the last arm.
"""

from __future__ import annotations

import argparse
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl

from benchmarks.feature_engine import BATCH, batches, entity_draws
from benchmarks.feature_windows import join_views
from benchmarks.harness import (
    ROOT,
    Arm,
    Figures,
    rounds,
    run_command,
    save,
    show,
    table,
    versions,
)
from causemesh.collector import collect_seldom
from services.features.domain.events import Ints
from services.features.domain.feature_store import FeatureStore

FEAST_PYTHON = ROOT / ".venv-feast" / "bin" / "python"
_PEER = Path(__file__).parent / "peers" / "feast_join.py"
_ROWS = 100
_WARM = 20


class Joined:
    """The store, full of events, and what it answers for every entity."""

    def __init__(self, entities: int) -> None:
        self.store = FeatureStore(join_views())
        for frame in batches(entity_draws(entities, 10 * BATCH, zipf=False)):
            for name, events in self.store.read("e", frame).items():
                self.store.views[name].apply(events)
        self.names = self.store.feature_names[:50]
        self.as_of_us = int(frame["occurred_at_us"].to_numpy().max()) + 1
        self.entities = entities
        self.vectors = self.answer(np.arange(entities))

    def requests(self, numbers: Ints) -> pl.DataFrame:
        """Requests for some entities."""
        tenant = pl.repeat("t", len(numbers), dtype=pl.String, eager=True)
        return pl.DataFrame({"tenant_id": tenant, "k": pl.Series(numbers).cast(pl.String)})

    def answer(self, numbers: Ints) -> np.ndarray:
        """Their vectors."""
        as_of = np.full(len(numbers), self.as_of_us)
        return self.store.answer_chunk(self.requests(numbers), self.names, as_of)


def ours(entities: int, joins: int) -> Figures:
    """Measure in this process; every answer must be that of the whole."""
    joined, rng = Joined(entities), np.random.default_rng(3)
    collect_seldom()
    as_of = np.full(_ROWS, joined.as_of_us)
    took, spent = [], []
    for _ in range(joins + _WARM):
        numbers = rng.integers(0, entities, _ROWS)
        requests = joined.requests(numbers)
        cpu, began = time.process_time(), time.perf_counter()
        answer = joined.store.answer_chunk(requests, joined.names, as_of)
        took.append(time.perf_counter() - began)
        spent.append(time.process_time() - cpu)
        if not np.array_equal(answer, joined.vectors[numbers], equal_nan=True):
            raise RuntimeError("an answer differs from that for all entities at once")
    ms, cpu_ms = np.array(took[_WARM:]) * 1e3, np.array(spent[_WARM:]) * 1e3
    return {
        "joins_per_second": 1e3 / float(ms.mean()),
        "p50_ms": float(np.percentile(ms, 50)),
        "p99_ms": float(np.percentile(ms, 99)),
        "cpu_ms": float(cpu_ms.mean()),
    }


def values(entities: int, path: Path) -> None:
    """Write what Feast is to look up."""
    joined = Joined(entities)
    columns = {
        name.replace(".", "_").replace("@", "_"): joined.vectors[:, place]
        for place, name in enumerate(joined.names)
    }
    keys = pl.Series("k", np.arange(entities)).cast(pl.String)
    pl.DataFrame({"k": keys, **columns}).write_parquet(path)


def feast(kind: str, path: Path, joins: int) -> Figures:
    """Feast over one of its stores, from empty."""
    with tempfile.TemporaryDirectory() as folder, _redis(kind == "redis", Path(folder)) as port:
        argv: list[str | Path] = [FEAST_PYTHON, _PEER, kind, path, folder, str(joins), str(port)]
        return run_command(argv)


@contextmanager
def _redis(wanted: bool, folder: Path) -> Iterator[int]:
    """A Redis of its own, in memory only; port 0 where none is wanted."""
    if not wanted:
        yield 0
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found = shutil.which("redis-server")
    if found is None:
        raise RuntimeError("no redis-server here: install Debian's package of that name")
    told = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
    with subprocess.Popen([found, *told], stdout=subprocess.DEVNULL) as server:
        try:
            _wait(port)
            yield port
        finally:
            server.terminate()


def _wait(port: int) -> None:
    until = time.monotonic() + 10
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.05)
        else:
            return


def arms(entities: int, joins: int, path: Path) -> list[Arm]:
    """Ours and Feast's."""
    mine = [sys.executable, "-m", "benchmarks.join_vs_feast", "--ours"]
    told = ["--entities", str(entities), "--joins", str(joins)]
    rate = "joins_per_second"
    looked_up = {"joins": joins // 10, "written by": "write_to_online_store"}
    return [
        Arm(
            "causemesh features",
            lambda: run_command([*mine, *told], {"POLARS_MAX_THREADS": "1"}),  # as services run
            {"joins": joins, "computed from": "tiles of 5 minutes, by two views"},
            rate,
        ),
        Arm("Feast, Redis", partial(feast, "redis", path, joins // 10), looked_up, rate),
        Arm("Feast, SQLite", partial(feast, "sqlite", path, joins // 10), looked_up, rate),
    ]


def main() -> None:
    """Measure and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--joins", type=int, default=2_000)
    parser.add_argument("--entities", type=int, default=10_000)
    parser.add_argument("--ours", action="store_true", help="our arm alone, in this process")
    parser.add_argument("--dry", action="store_true", help="print, save nothing")
    told = parser.parse_args()
    if told.ours:
        print(json.dumps({"figures": ours(told.entities, told.joins)}))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "values.parquet"
        values(told.entities, path)
        chosen = arms(told.entities, told.joins, path)
        found = rounds(chosen, told.rounds)
    show(chosen, found)
    if not told.dry:
        about = {"requests": _ROWS, "features": 50, "entities": told.entities}
        of = {**versions("polars", "numpy"), **_feast_versions()}
        save("join", {"arms": table(chosen, found)}, about={**about, "rounds": told.rounds}, of=of)


def _feast_versions() -> dict[str, str]:
    program = (
        "import json; from importlib.metadata import version;"
        "print(json.dumps({'figures': {n: version(n) for n in ('feast', 'redis')}}))"
    )
    redis = subprocess.run(
        ["redis-server", "--version"], capture_output=True, text=True, check=True
    )
    server = redis.stdout.split("v=")[1].split()[0]
    return {**run_command([FEAST_PYTHON, "-c", program]), "redis-server": server}


if __name__ == "__main__":
    main()
