"""How fast the feature engine is on one core for the shapes that are promised.

Eight aggregations over three windows with 100,000 entities; a join of 100 requests by 50 features;
and what 2,000,000 entities of ten features cost. Times are of the process's own CPU.

usage: python benchmarks/feature_windows.py [--events 1000000] [--rounds 3] [--millions]
"""

from __future__ import annotations

import argparse
import resource
import time

import numpy as np
import polars as pl

from benchmarks.feature_engine import BATCH, batches, entity_draws
from causemesh.collector import collect_seldom
from services.features.domain.definitions import FeatureView
from services.features.domain.events import read_events
from services.features.domain.feature_store import FeatureStore
from services.features.domain.memory import entity_bytes
from services.features.domain.parsing import parse_views

PLAIN = ["count", "sum", "mean", "min", "max", "std", "first", "last"]
SKETCHED = ["count", "sum", "mean", "min", "max", "std", "distinct", "p50"]


def view_of(aggregations: list[str], windows: list[str], tile: str, **more: object) -> FeatureView:
    """A view of one column."""
    body = {
        "event": "e", "entity": "k", "windows": windows, "tile": tile,
        "features": {"x": aggregations}, **more,
    }  # fmt: skip
    return parse_views({"views": {"v": body}})[0]


def measure_apply(name: str, view: FeatureView, entities: int, events: int, zipf: bool) -> None:
    """Read and apply all events, the entities known, as in steady state; CPU seconds."""
    store = FeatureStore([view])
    state = store.views[view.id]
    for frame in batches(np.arange(entities)):
        state.encode(read_events(view, frame))
    frames = list(batches(entity_draws(entities, events, zipf)))
    spent = {"read": 0.0, "encode": 0.0, "apply": 0.0}
    for frame in frames:
        clock = [time.process_time()]
        read = read_events(view, frame)
        clock.append(time.process_time())
        coded = state.encode(read)
        clock.append(time.process_time())
        state.apply(coded, int(frame["occurred_at_us"].to_numpy().max()))
        clock.append(time.process_time())
        for step, took in zip(spent, np.diff(clock), strict=True):
            spent[step] += float(took)
    rates = ", ".join(f"{step} {events / took:,.0f}/s" for step, took in spent.items())
    print(f"{name}: {events / sum(spent.values()):,.0f} events a CPU second ({rates})")
    print(f"{name}: {state.memory_bytes() / 2**20:,.0f} MiB for {len(state.entities):,} entities")


def join_views() -> list[FeatureView]:
    """Two views that give fifty features."""
    windows = ["1h", "2h", "3h"]
    return parse_views(
        {
            "views": {
                "v": {
                    "event": "e", "entity": "k", "windows": windows, "tile": "5m",
                    "features": {"x": PLAIN},
                },
                "w": {
                    "event": "e", "entity": "k", "windows": windows, "tile": "5m",
                    "columns": {"y": "x >= 1"},
                    "features": {"y": PLAIN, "x": ["mean 1h/3h"], "*": ["count 3h"]},
                },
            }
        }
    )  # fmt: skip


def measure_join(entities: int) -> None:
    """Fifty features for a hundred requests, out of two views."""
    store = FeatureStore(join_views())
    for frame in batches(entity_draws(entities, 10 * BATCH, zipf=False)):
        for name, events in store.read("e", frame).items():
            store.views[name].apply(events)
    names, rng = store.feature_names[:50], np.random.default_rng(3)
    newest = int(next(iter(batches(np.arange(BATCH))))["occurred_at_us"].to_numpy().max()) * 9
    collect_seldom()  # as every service does
    took = []
    for _ in range(2000):
        keys = pl.Series("k", rng.integers(0, entities, 100)).cast(pl.String)
        frame = pl.DataFrame({"tenant_id": pl.repeat("t", 100, eager=True), "k": keys})
        start = time.process_time()
        store.answer_chunk(frame, names, np.full(100, newest))
        took.append(time.process_time() - start)
    p50, p99 = np.percentile(np.array(took) * 1e3, [50, 99])
    print(f"join 100 requests x {len(names)} features: p50 {p50:.2f} p99 {p99:.2f} ms of CPU")


def measure_millions() -> None:
    """Two million entities by ten features, and the process's peak memory."""
    view = view_of(["count", "sum", "mean", "latest", "last"], ["1h", "24h"], "1h", retention="7d")
    plain = view_of(["count", "sum", "mean", "min", "max"], ["6h", "24h"], "2h")
    for one in (view, plain):
        print(f"{len(one.features)} features, {one.tiles} tiles: {entity_bytes(one):,} bytes each")
    state = FeatureStore([plain]).views[plain.id]
    count = 2_000_000
    for start in range(0, count, BATCH):
        rng = np.random.default_rng(start)
        for hour in range(0, 26, 2):
            frame = pl.DataFrame(
                {
                    "tenant_id": pl.repeat("t", BATCH, eager=True),
                    "k": pl.Series(np.arange(start, start + BATCH)).cast(pl.String),
                    "occurred_at_us": np.full(BATCH, hour * 3_600_000_000),
                    "source": np.zeros(BATCH, np.int32),
                    "position": np.arange(BATCH),
                    "x": rng.normal(0, 3, BATCH),
                }
            )
            state.apply(read_events(plain, frame))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{len(state.entities):,} entities x {len(plain.features)} features: arrays and keys "
        f"{state.memory_bytes() / 2**30:.2f} GiB, peak of the process {peak:.2f} GiB"
    )


def main() -> None:
    """Run all measurements."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--entities", type=int, default=100_000)
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--millions", action="store_true")
    arguments = parser.parse_args()
    if arguments.millions:
        measure_millions()
        return
    windows = ["1h", "2h", "3h"]
    for _ in range(arguments.rounds):
        for name, kinds in (("plain", PLAIN), ("sketches", SKETCHED)):
            view = view_of(kinds, windows, "5m")
            for draw in (True, False):
                label = f"{name}, {'zipf' if draw else 'uniform'}"
                measure_apply(label, view, arguments.entities, arguments.events, draw)
        measure_join(arguments.entities)


if __name__ == "__main__":
    main()
