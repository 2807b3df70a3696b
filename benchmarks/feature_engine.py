"""How fast the feature engine is on one core: apply, join, and a replay chunk.

usage: python benchmarks/feature_engine.py [--entities 100000] [--events 1000000]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import polars as pl

from services.features.domain.definitions import FeatureView
from services.features.domain.engine import ViewState
from services.features.domain.events import read_events
from services.features.domain.feature_store import FeatureStore
from services.features.domain.parsing import parse_views
from services.features.domain.state import PartitionState

BATCH = 100_000
HOUR_US = 3_600_000_000
Draw = npt.NDArray[np.int64]


def benchmark_view() -> FeatureView:
    """Five aggregations over three windows, and five more features to make twenty."""
    body = {
        "event": "e",
        "entity": "k",
        "windows": ["1h", "2h", "3h"],
        "tile": "5m",
        "columns": {"y": "x >= 1"},
        "features": {
            "*": ["count"],
            "x": ["mean", "min", "max", "std"],
            "y": ["sum", "mean 1h 2h"],
        },
    }
    return parse_views({"views": {"v": body}})[0]


def entity_draws(entities: int, events: int, zipf: bool) -> Draw:
    """Which entity each event is of."""
    rng = np.random.default_rng(1)
    if zipf:
        return np.asarray(rng.zipf(1.3, events) % entities, np.int64)
    return np.asarray(rng.integers(0, entities, events), np.int64)


def batches(draws: Draw) -> Iterator[pl.DataFrame]:
    """Frames as the codec makes them, fifteen minutes of event time each."""
    rng = np.random.default_rng(2)
    for number, start in enumerate(range(0, len(draws), BATCH)):
        part = draws[start : start + BATCH]
        yield pl.DataFrame(
            {
                "tenant_id": pl.repeat("t", len(part), eager=True),
                "k": pl.Series(part).cast(pl.String),
                "occurred_at_us": number * HOUR_US // 4
                + np.sort(rng.integers(0, HOUR_US // 4, len(part))),
                "source": np.zeros(len(part), np.int32),
                "position": start + np.arange(len(part)),
                "x": rng.normal(0, 3, len(part)),
            }
        )


def measure_apply(name: str, entities: int, events: int, zipf: bool) -> FeatureStore:
    """Read and apply all events; print the rates of each step and of both."""
    store = FeatureStore([benchmark_view()])
    state, spent = store.views["v@v1"], {"read": 0.0, "encode": 0.0, "apply": 0.0}
    for frame in batches(np.arange(entities)):
        state.encode(read_events(state.view, frame))  # entities known, as in steady state
    for frame in batches(entity_draws(entities, events, zipf)):
        clock = [time.perf_counter()]
        read = read_events(state.view, frame)
        clock.append(time.perf_counter())
        coded = state.encode(read)
        clock.append(time.perf_counter())
        state.apply(coded)
        clock.append(time.perf_counter())
        for step, took in zip(spent, np.diff(clock), strict=True):
            spent[step] += float(took)
    rates = ", ".join(f"{step} {events / took:,.0f}/s" for step, took in spent.items())
    print(f"{name}: {events / sum(spent.values()):,.0f} events/s ({rates})")
    print(f"{name}: {state.memory_bytes() / 2**20:,.0f} MiB for {len(state.entities):,} entities")
    return store


def measure_join(store: FeatureStore, entities: int, rows: int = 100) -> None:
    """Twenty features for a hundred requests, from keys and from a request frame."""
    state = store.views["v@v1"]
    names, rng = store.feature_names[:20], np.random.default_rng(3)
    newest = int(state.ring.newest_tiles(state.index.rows).max() + 1) * state.view.tile_us
    from_rows, from_frame = [], []
    for _ in range(1000):
        keys = pl.Series("k", rng.integers(0, entities, rows)).cast(pl.String)
        frame = pl.DataFrame({"tenant_id": pl.repeat("t", rows, eager=True), "k": keys})
        composite = "t\x1f" + keys
        as_of = np.full(rows, newest)
        start = time.perf_counter()
        state.answer(composite, as_of)
        middle = time.perf_counter()
        store.answer_chunk(frame, names, as_of)
        from_rows.append(middle - start)
        from_frame.append(time.perf_counter() - middle)
    for name, took in (("keys", from_rows), ("a request frame", from_frame)):
        p50, p99 = np.percentile(np.array(took) * 1e3, [50, 99])
        what = f"join {rows} rows x {len(names)} features from {name}"
        print(f"{what}: p50 {p50:.2f} p99 {p99:.2f} ms")


def measure_replay(state: ViewState, entities: int, events: int) -> None:
    """One chunk of events, and as many requests spread over its slices."""
    draws = entity_draws(entities, events, zipf=True)
    rng = np.random.default_rng(4)
    frame = pl.concat(batches(draws)).with_columns(
        occurred_at_us=np.sort(rng.integers(0, 24 * HOUR_US, events))
    )
    read = read_events(state.view, frame)
    keys = "t\x1f" + pl.Series(draws).cast(pl.String)
    as_of = np.sort(rng.integers(0, 24 * 60, events)) * 60_000_000
    start = time.perf_counter()
    ViewState(state.view).answer_chunk(read, keys, as_of)
    print(f"replay: {events / (time.perf_counter() - start):,.0f} requests/s over 1,440 slices")


def measure_live(entities: int, pending: int, rows: int) -> None:
    """Live requests against a partition whose watermark lags: events that were not applied yet."""
    state = PartitionState([benchmark_view()])
    state.declare("all", state.store.feature_names)
    for frame in batches(entity_draws(entities, pending, zipf=True)):
        state.add_events("e", frame)
    rng, took = np.random.default_rng(5), []
    for number in range(300):
        request = pl.DataFrame(
            {
                "tenant_id": pl.repeat("t", rows, eager=True),
                "k": pl.Series(rng.integers(0, entities, rows)).cast(pl.String),
                "occurred_at_us": np.full(rows, 6 * HOUR_US),
                "source": np.zeros(rows, np.int32),
                "position": number * rows + np.arange(rows),
                "mode": pl.repeat("live", rows, eager=True),
                "signature": pl.repeat("all", rows, eager=True),
            }
        )
        start = time.perf_counter()
        state.add_requests(request)
        state.ready()
        took.append(time.perf_counter() - start)
    p50, p99 = np.percentile(np.array(took) * 1e3, [50, 99])
    what = f"live, {rows} rows, {pending:,} events waiting for the watermark"
    print(f"{what}: p50 {p50:.2f} p99 {p99:.2f} ms")


def measure_snapshot(state: ViewState) -> None:
    """Save and restore the whole state."""
    start = time.perf_counter()
    saved = state.snapshot()
    middle = time.perf_counter()
    ViewState(state.view).restore(saved)
    print(
        f"snapshot: {len(saved) / 2**20:.0f} MiB, saved in {middle - start:.2f} s, "
        f"restored in {time.perf_counter() - middle:.2f} s"
    )


def main() -> None:
    """Run all measurements."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--entities", type=int, default=100_000)
    parser.add_argument("--events", type=int, default=1_000_000)
    arguments = parser.parse_args()
    measure_apply("zipf", arguments.entities, arguments.events, zipf=True)
    store = measure_apply("uniform", arguments.entities, arguments.events, zipf=False)
    measure_join(store, arguments.entities)
    measure_replay(store.views["v@v1"], arguments.entities, 100_000)
    for pending, rows in ((0, 1), (0, 100), (300_000, 100)):
        measure_live(arguments.entities, pending, rows)
    measure_snapshot(store.views["v@v1"])


if __name__ == "__main__":
    main()
