"""How fast the codec is on one core: columns against fastavro one record at a time.

usage: python benchmarks/codec.py [--seconds 0.5]
"""

from __future__ import annotations

import argparse
import asyncio
import io
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import fastavro
import numpy as np
import polars as pl

from causemesh.catalogue import Catalogue
from causemesh.codec.columns import frame_schema
from causemesh.codec.decode import Decoder
from causemesh.codec.encode import FEW_ROWS, ColumnwiseEncoder, Encoder, RowwiseEncoder
from causemesh.codec.registry import MemoryRegistry
from causemesh.codec.wire import HEADER_BYTES

RECORDS = ("PredictionMade", "TaskPrepared", "PredictionRequested")
SIZES = (1, 100, 5000)
START_US = 1_357_000_000_000_000
VECTOR_BYTES = 80
Schema = Mapping[str, Any]


def schemas() -> dict[str, Schema]:
    """The measured records, envelope included."""
    topics = Catalogue.load().topics.values()
    known = {topic.record["name"]: topic.record for topic in topics}
    return {name: known[name] for name in RECORDS}


def rows(count: int) -> list[dict[str, Any]]:
    """Every field of the measured records, as the flights example has them."""
    rng = np.random.default_rng(1)
    ids = [[rng.bytes(16).hex() for _ in range(2)] for _ in range(count)]
    return [
        {
            "event_id": event_id,
            "tenant_id": ("UA", "B6", "EV")[number % 3],
            "cause": {
                "topic": "inference.requests.v1",
                "partition": number % 12,
                "position": 1_000_000 + number,
                "index": 0,
                "origin": None,
            },
            "request_id": request_id,
            "model": "late",
            "version": 3,
            "outcome": "failed" if number % 50 == 0 else "predicted",
            "score": None if number % 50 == 0 else float(rng.random()),
            "reason": "no vector" if number % 50 == 0 else None,
            "vector": rng.bytes(VECTOR_BYTES),
            "lane": ("realtime", "batch")[number % 2],
            "compute_ms": float(rng.random()),
            "failure": None,
            "entities": [
                {"name": "origin", "value": "EWR"},
                {"name": "tail", "value": f"N{number}"},
            ],
            "inputs": [{"name": "distance", "value": float(rng.random())}] * (number % 4),
            "mode": "live",
        }
        for number, (event_id, request_id) in enumerate(ids)
    ]


def frame(schema: Schema, count: int) -> pl.DataFrame:
    """Rows of one record as columns."""
    types = frame_schema(schema)
    instants = {
        name: (START_US + 1000 * pl.int_range(count, eager=True)).cast(dtype).alias(name)
        for name, dtype in types.items()
        if isinstance(dtype, pl.Datetime)
    }
    plain = {name: dtype for name, dtype in types.items() if name not in instants}
    made = pl.DataFrame([{name: row[name] for name in plain} for row in rows(count)], schema=plain)
    return made.with_columns(*instants.values()).select(*types)


def rate(work: Callable[[], Any], count: int, seconds: float) -> float:
    """Records/s of the best of the repetitions that fit in `seconds`; there are three at least."""
    work()
    best, spent, repetitions = float("inf"), 0.0, 0
    while spent < seconds or repetitions < 3:
        start = time.perf_counter()
        work()
        took = time.perf_counter() - start
        best, spent, repetitions = min(best, took), spent + took, repetitions + 1
    return count / best


def one_by_one(schema: Any, values: list[bytes]) -> list[Any]:
    """Decode with fastavro."""
    return [
        fastavro.schemaless_reader(io.BytesIO(value[HEADER_BYTES:]), schema, None)
        for value in values
    ]


def measure(schema: Schema, count: int, seconds: float) -> list[float]:
    """Encode: Encoder, by columns, fastavro. Decode: Decoder, fastavro."""
    registry = MemoryRegistry()
    loop = asyncio.new_event_loop()
    schema_id = loop.run_until_complete(registry.register("s", schema))
    encoders = [kind(schema, schema_id) for kind in (Encoder, ColumnwiseEncoder, RowwiseEncoder)]
    batch, decoder = frame(schema, count), Decoder(registry)
    values, parsed = encoders[0].encode(batch), fastavro.parse_schema(dict(schema))
    measured = [rate(partial(each.encode, batch), count, seconds) for each in encoders]
    decode = rate(lambda: loop.run_until_complete(decoder.decode(values, schema)), count, seconds)
    loop.close()
    return [*measured, decode, rate(lambda: one_by_one(parsed, values), count, seconds)]


def main() -> None:
    """Print a table of all measurements."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=0.5)
    arguments = parser.parse_args()
    print(f"records/s; the encoder goes by rows below {FEW_ROWS} rows")
    heads = ("encode", "by columns", "fastavro", "ratio", "decode", "fastavro", "ratio")
    print(f"{'record':<20}{'batch':>6}" + "".join(f"{head:>12}" for head in heads))
    for name, schema in schemas().items():
        for count in SIZES:
            ours, columns, loop, decode, singly = measure(schema, count, arguments.seconds)
            cells = [f"{ours:,.0f}", f"{columns:,.0f}", f"{loop:,.0f}", f"{ours / loop:.1f}"]
            cells += [f"{decode:,.0f}", f"{singly:,.0f}", f"{decode / singly:.1f}"]
            print(f"{name:<20}{count:>6}" + "".join(f"{cell:>12}" for cell in cells))


if __name__ == "__main__":
    main()
