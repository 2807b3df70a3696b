"""Durations as people write them (`15m`, `3h`, `7d`) and as the engine counts them (int64 us)."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

_UNITS_US = {"ms": 1_000, "s": 10**6, "m": 60 * 10**6, "h": 3600 * 10**6, "d": 86_400 * 10**6}
_TEXT = re.compile(r"([1-9][0-9]*)(ms|s|m|h|d)\Z")

# Tiles a person can reason about: each divides a minute, an hour, a day or a year of weeks.
_NICE_US = [
    count * _UNITS_US[unit]
    for unit, counts in {
        "ms": (1, 2, 5, 10, 20, 50, 100, 200, 500),
        "s": (1, 2, 5, 10, 15, 30),
        "m": (1, 2, 5, 10, 15, 20, 30),
        "h": (1, 2, 3, 4, 6, 12),
        "d": (1, 7),
    }.items()
    for count in counts
]
_LEAST_TILES = 12
_MOST_TILES = 336


def parse_duration(text: object) -> int:
    """Microseconds of a duration such as `90s`, `15m`, `3h` or `7d`; ValueError otherwise."""
    found = _TEXT.match(text) if isinstance(text, str) else None
    if found is None:
        raise ValueError(f"{text!r} is no duration; write a whole number and ms, s, m, h or d")
    return int(found[1]) * _UNITS_US[found[2]]


def format_duration(duration_us: int) -> str:
    """The shortest text that `parse_duration` reads back (`us` below a millisecond)."""
    for unit, length in reversed(_UNITS_US.items()):
        if duration_us and duration_us % length == 0:
            return f"{duration_us // length}{unit}"
    return f"{duration_us}us"


def default_tile(windows_us: Sequence[int]) -> int:
    """The tile for these windows: it divides them all and cuts the longest in 336 or fewer.

    Among those it is the longest that still cuts the shortest window in 12 or more, so that a
    window's trailing edge moves by at most a twelfth of it; where no tile does both, memory goes
    first and the shortest one is taken. ValueError when the windows have no such divisor.
    """
    if not windows_us:
        return _UNITS_US["h"]
    common = math.gcd(*windows_us)
    choices = [common // n for n in range(1, _LEAST_TILES + 1) if common % n == 0]
    choices = sorted({c for c in _NICE_US if common % c == 0} or choices)
    fitting = [c for c in choices if max(windows_us) // c <= _MOST_TILES]
    if not fitting:
        raise ValueError("no tile divides all windows in a reasonable number; set `tile` yourself")
    fine = [c for c in fitting if min(windows_us) // c >= _LEAST_TILES]
    return fine[-1] if fine else fitting[0]
