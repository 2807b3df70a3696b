"""What a worker tells about its work, for metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from causemesh.runner.stage import Stage


@dataclass(frozen=True)
class UnitReport:
    """One finished unit of work. `seconds` spans decode to commit; `watermark_us` may be NEVER.

    `records_of` and `sent_to` are `records` and `sent` by topic. `exemplar` is the trace_id and
    span_id of one of its records; None when none was traced.
    """

    records: int
    replays: int
    dead: int
    sent: int
    seconds: float
    watermark_us: int
    records_of: Mapping[str, int] = field(default_factory=dict)
    sent_to: Mapping[str, int] = field(default_factory=dict)
    exemplar: Mapping[str, str] | None = None


class Observer(Protocol):
    """Hears of every unit that brought records."""

    def unit_done(self, stage: Stage, partition: int, report: UnitReport) -> None:
        """A unit is over."""


class Unobserved:
    """Tells nobody."""

    def unit_done(self, stage: Stage, partition: int, report: UnitReport) -> None:
        """See `Observer.unit_done`."""
