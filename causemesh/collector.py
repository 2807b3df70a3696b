"""Python's cycle collector, set for work that comes in units of ten thousand records."""

from __future__ import annotations

import gc

_COLLECT_AFTER = (100_000, 20, 20)


def collect_seldom() -> None:
    """Let the cycle collector run by what a unit of work allocates, not at each 700 objects.

    A unit holds some ten thousand records of several objects each. By default the collector looks
    at all of them again and again while they come in, and finds nothing: two thirds of the time of
    reading Kafka, measured with perf. What was imported stays as long as the process does and is
    not looked at any more.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_COLLECT_AFTER)
