"""What an event costs, and what an entity holds, from a thousand to two million entities.

usage: python -m benchmarks.cost_by_entities [--events 1000000] [--rounds 3]

A view of ten features; every entity has a tile of the past already. Events draw their entity
evenly, the worst case: no two of a batch share a tile. Processor time of reading, finding rows and
applying, best of the rounds; each size in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

import numpy as np
import polars as pl

from benchmarks.feature_windows import view_of
from benchmarks.harness import run_command, save, versions
from benchmarks.service_run import peak_rss_mb
from causemesh.collector import collect_seldom
from services.features.domain.definitions import FeatureView
from services.features.domain.engine import ViewState
from services.features.domain.events import Ints, read_events

_UNIT = 20_000  # as the service reads
_TILE_US = 2 * 3_600_000_000
_STEPS = ("read", "encode", "apply")


def view() -> FeatureView:
    """Five aggregations over two windows."""
    return view_of(["count", "sum", "mean", "min", "max"], ["6h", "24h"], "2h")


def unit(numbers: Ints, at_us: int, first: int) -> pl.DataFrame:
    """Events of these entities."""
    rng = np.random.default_rng(first)
    return pl.DataFrame(
        {
            "tenant_id": pl.repeat("t", len(numbers), dtype=pl.String, eager=True),
            "k": pl.Series(numbers).cast(pl.String),
            "occurred_at_us": np.full(len(numbers), at_us),
            "source": np.zeros(len(numbers), np.int32),
            "position": first + np.arange(len(numbers)),
            "x": rng.normal(0, 3, len(numbers)),
        }
    )


def measure(entities: int, events: int, rounds: int) -> dict[str, float]:
    """Microseconds an event by step, and bytes an entity."""
    state = ViewState(view())
    for start in range(0, entities, _UNIT):
        numbers = np.arange(start, min(start + _UNIT, entities))
        state.apply(read_events(state.view, unit(numbers, 0, start)))
    collect_seldom()
    draws = np.random.default_rng(1).integers(0, entities, events)
    best = dict.fromkeys(_STEPS, np.inf)
    for number in range(1, rounds + 1):
        spent = dict.fromkeys(_STEPS, 0.0)
        for start in range(0, events, _UNIT):
            frame = unit(draws[start : start + _UNIT], number * _TILE_US, start)
            clock = [time.process_time()]
            read = read_events(state.view, frame)
            clock.append(time.process_time())
            coded = state.encode(read)
            clock.append(time.process_time())
            state.apply(coded)
            clock.append(time.process_time())
            for step, took in zip(_STEPS, np.diff(clock), strict=True):
                spent[step] += float(took)
        best = {step: min(best[step], spent[step]) for step in _STEPS}
    by_step = {f"{step}_us": best[step] / events * 1e6 for step in _STEPS}
    return {
        "entities": entities,
        "us_per_event": sum(by_step.values()),
        **by_step,
        "bytes_per_entity": state.memory_bytes() / entities,
        "peak_rss_mb": peak_rss_mb(),
    }


def main() -> None:
    """Measure each size in a process of its own, write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--entities", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000, 2_000_000]
    )
    parser.add_argument("--one", action="store_true", help="in this process, the first size alone")
    parser.add_argument("--dry", action="store_true", help="print, save nothing")
    told = parser.parse_args()
    if told.one:
        figures = measure(told.entities[0], told.events, told.rounds)
        print(json.dumps({"figures": figures}))
        return
    runs = []
    for entities in told.entities:
        argv = [sys.executable, "-m", "benchmarks.cost_by_entities", "--one"]
        more = {"--entities": entities, "--events": told.events, "--rounds": told.rounds}
        argv += [str(part) for pair in more.items() for part in pair]
        runs.append(run_command(argv, {"POLARS_MAX_THREADS": "1"}))
        print(runs[-1], flush=True)
    if not told.dry:
        about = {"events": told.events, "rounds": told.rounds, "features": 10}
        save("entities", {"runs": runs}, about=about, of=versions("polars", "numpy"))


if __name__ == "__main__":
    main()
