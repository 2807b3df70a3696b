"""What the Python peers of `windows_vs_peers` share: the state of a window, and its results.

Imported by scripts beside it, in the peers' own environment.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import fastavro

HOURS = (1, 2, 3)
_HEADER = "key,hours,count,sum,mean,min,max,std,first,last\n"
# count, sum, sum of squares, min, max, first, last: events come in order of time
State = list[float]


def nothing() -> State:
    """The state of a window without events."""
    return [0, 0.0, 0.0, math.inf, -math.inf, math.nan, math.nan]


def added(state: State, value: float) -> State:
    """The state with one event more."""
    count, total, squares, least, most, first, _ = state
    return [
        count + 1,
        total + value,
        squares + value * value,
        min(value, least),
        max(value, most),
        first if count else value,
        value,
    ]


def reader(schema_file: str, schema_id: str) -> Any:
    """Decodes framed Avro; None for records of another schema."""
    with open(schema_file) as file:
        schema = fastavro.parse_schema(json.load(file))
    header = b"\0" + int(schema_id).to_bytes(4, "big")

    def read(value: bytes) -> Any:
        if value[:5] != header:
            return None
        return fastavro.schemaless_reader(io.BytesIO(value[5:]), schema)

    return read


def write_results(path: str, windows: Mapping[int, Iterable[tuple[str, State]]]) -> None:
    """The eight aggregates of each key in one window of each length."""
    with open(path, "w") as file:
        file.write(_HEADER)
        for hours, states in windows.items():
            for key, (count, total, squares, least, most, first, last) in states:
                mean = total / count
                std = math.sqrt(max(squares / count - mean * mean, 0.0))
                numbers = (count, total, mean, least, most, std, first, last)
                file.write(f"{key},{hours},{','.join(map(repr, numbers))}\n")


def peak_rss_mb() -> float:
    """Most memory of this process so far; getrusage would count what its parent had at the fork."""
    told = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(told[1]) / 1000 if told else 0.0
