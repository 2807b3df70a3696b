"""In-band watermarks: what each cause source has promised, and the least of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from causemesh.bus.base import TopicPartition
from causemesh.runner.batch import NEVER


class WatermarkTracker:
    """The watermark of every expected source of every input partition, microseconds.

    `expected` maps an input partition to the cause sources whose promises must arrive on it. An
    input without expected sources (a state topic) holds nothing back.
    """

    def __init__(self, expected: Mapping[TopicPartition, Sequence[TopicPartition]]) -> None:
        self._promised = {
            source: dict.fromkeys(origins, NEVER) for source, origins in expected.items()
        }

    def promise(self, source: TopicPartition, origin: TopicPartition, at_us: int) -> None:
        """Record a promise; an older or unexpected one changes nothing."""
        by_origin = self._promised.get(source, {})
        if origin in by_origin:
            by_origin[origin] = max(at_us, by_origin[origin])

    def of_input(self, source: TopicPartition) -> int | None:
        """The least promise on one input partition; None when it expects none."""
        by_origin = self._promised.get(source)
        return min(by_origin.values()) if by_origin else None

    def least(self) -> int:
        """The least promise over all inputs: nothing older will come."""
        known = [min(by_origin.values()) for by_origin in self._promised.values() if by_origin]
        return min(known, default=NEVER)

    def dump(self) -> list[list[Any]]:
        """JSON-ready form."""
        return [
            [*source, *origin, at_us]
            for source, by_origin in self._promised.items()
            for origin, at_us in by_origin.items()
            if at_us != NEVER
        ]

    def load(self, rows: Iterable[Sequence[Any]]) -> None:
        """Add dumped promises."""
        for topic, partition, origin_topic, origin_partition, at_us in rows:
            self.promise((topic, partition), (origin_topic, origin_partition), at_us)
