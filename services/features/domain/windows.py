"""The shapes of a window, as runs of whole tiles.

All are runs of ages: age 0 is the tile `K = floor((s - 1) / h)` that the as-of time `s` falls in,
age 1 the tile before it, and so on.

sliding    the `n` newest tiles: ages [0, n).
tumbling   the last complete one of the windows that start at whole multiples of their length since
           1970 (UTC): the events with `floor(s / w) * w - w <= t < floor(s / w) * w`.
session    the session that is open as of `s`: the newest event, all events before it that follow
           one another by at most `gap`, and nothing if the newest one is more than `gap` before
           `s`. A tile is no longer than the gap, so two events of one tile are always of one
           session, and the first and last time of each tile are enough to find its start: times
           are minima, and merge in any order. What is older than `length` is not looked at.
decayed    for `ewma` alone: the last LOOK_BACK half-lives, each tile with the weight of its age.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from services.features.domain.durations import format_duration, parse_duration

Shape = Literal["sliding", "tumbling", "session", "decayed"]
_ORDER: tuple[Shape, ...] = ("sliding", "tumbling", "session", "decayed")
# What is older than so many half-lives weighs less than 1/256 and is left out.
LOOK_BACK = 8


@dataclass(frozen=True)
class Window:
    """`length_us` is how far back it may reach; `part_us` a session's gap, or a half-life."""

    length_us: int
    shape: Shape = "sliding"
    part_us: int = 0

    @property
    def rank(self) -> tuple[int, int, int]:
        """Sliding windows first, shortest first."""
        return (_ORDER.index(self.shape), self.length_us, self.part_us)

    @property
    def reach_us(self) -> int:
        """The age at which no answer sees an event any more."""
        # the last complete window may have ended almost a whole length ago
        return self.length_us * (2 if self.shape == "tumbling" else 1)

    @property
    def lengths(self) -> tuple[int, ...]:
        """All that must be whole tiles."""
        return (self.length_us, self.part_us) if self.part_us else (self.length_us,)

    @property
    def text(self) -> str:
        """As it is written in YAML."""
        length = format_duration(self.length_us)
        if self.shape == "decayed":
            return format_duration(self.part_us)
        if self.shape == "session":
            return f"session:{format_duration(self.part_us)}:{length}"
        return length if self.shape == "sliding" else f"tumbling:{length}"


def parse_window(text: str) -> Window:
    """`3h`, `tumbling:1d` or `session:30m:6h` (gap, then the longest); ValueError otherwise."""
    shape, *durations = text.split(":")
    if shape == "tumbling" and len(durations) == 1:
        return Window(parse_duration(durations[0]), "tumbling")
    if shape == "session" and len(durations) == 2:
        return Window(parse_duration(durations[1]), "session", parse_duration(durations[0]))
    if durations:
        raise ValueError(f"{text!r} is no window; write 3h, tumbling:1d or session:30m:6h")
    return Window(parse_duration(text))


def half_life(text: str) -> Window:
    """The window of an `ewma` of this half-life; ValueError when it is no duration."""
    length_us = parse_duration(text)
    return Window(LOOK_BACK * length_us, "decayed", length_us)


def window_problems(window: Window, tile_us: int) -> list[str]:
    """Why a window cannot be cut into tiles of this length."""
    problems = [
        f"window {window.text} is no multiple of the tile {format_duration(tile_us)}"
        for length in window.lengths
        if length <= 0 or length % tile_us
    ]
    if window.shape == "session" and window.part_us > window.length_us:
        problems.append(f"window {window.text} is shorter than its gap")
    return problems[:1]


def decay_weights(window: Window, tile_us: int) -> list[int]:
    """The weight of each age, 2**16 for the newest tile: whole, so that weighted sums are exact."""
    tiles = window.length_us // tile_us
    return [round(2**16 * 2.0 ** (-(age * tile_us) / window.part_us)) for age in range(tiles)]


def ordered(windows: Sequence[Window]) -> tuple[Window, ...]:
    """Each once: sliding ones first, shortest first."""
    return tuple(sorted(set(windows), key=lambda window: window.rank))
