"""What compressing a record costs, and what it saves, by codec and level.

usage: python -m benchmarks.compression

Departures of the flights example as the client writes them, 2,000 a batch and one alone. Best of
many, in microseconds of processor time a record, and the size that is left.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import cramjam
from aiokafka.codec import lz4_encode

from causemesh.catalogue import Catalogue
from causemesh.codec.encode import Encoder
from examples.flights.dataset import load

_RECORDS, _ROUNDS = 2_000, 20


def codecs() -> dict[str, Callable[[bytes], bytes]]:
    """The codecs that aiokafka knows, at the levels in question."""
    found: dict[str, Callable[[bytes], bytes]] = {
        f"lz4 level {level}": lambda data, level=level: lz4_encode(data, level)  # type: ignore[misc]
        for level in (9, 4, 1)
    }
    found["snappy"] = lambda data: bytes(cramjam.snappy.compress_raw(data))
    found["zstd level 1"] = lambda data: bytes(cramjam.zstd.compress(data, level=1))
    return found


def best_us(work: Callable[[bytes], bytes], data: bytes) -> float:
    """Microseconds of processor time of the quickest of many."""
    taken = []
    for _ in range(_ROUNDS):
        began = time.process_time_ns()
        work(data)
        taken.append((time.process_time_ns() - began) / 1000)
    return min(taken)


def main() -> None:
    """Measure and print."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    catalogue = Catalogue.load([Path("examples/flights")], partitions=1)
    encoder = Encoder(catalogue.topic("inbox.flight_departed").record, 1)
    values = encoder.encode(load(1, 5).departed)[:_RECORDS]
    print(f"{'':16}{'us a record':>14}{'size':>8}{'us alone':>12}{'size':>8}")
    for name, work in codecs().items():
        cells = ""
        for count, width in ((_RECORDS, 14), (1, 12)):
            data = b"".join(values[:count])
            share = len(work(data)) / len(data)
            cells += f"{best_us(work, data) / count:>{width}.2f}{share:>8.2f}"
        print(f"{name:16}{cells}")


if __name__ == "__main__":
    main()
