"""Model versions, followed from their topic.

Every process reads the whole of models.versions.v1 (it is compacted) into memory before any worker
handles a record, and follows it from there. The workers do not read it themselves: one that waits
for a version reads nothing, so it could not read what it waits for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import polars as pl
import structlog
from prometheus_client import Counter

from causemesh.bus.base import BEFORE_FIRST, Bus, RawBatch, TopicPartition
from causemesh.catalogue import Catalogue
from causemesh.clock import SystemClock
from causemesh.codec.base import BatchDecoder
from causemesh.codec.columns import frame_schema
from causemesh.periodic import repeat
from services.drift.domain.labels import LabelRule
from services.drift.domain.versions import Version, read_version

VERSIONS = "models.versions.v1"
_log = structlog.get_logger(__name__)
_FETCH = 1_000
_WAIT_S = 5.0  # it returns as soon as something comes


class Versions:
    """The newest registration of each model version, and the label rules in force."""

    def __init__(
        self, bus: Bus, catalogue: Catalogue, decoder: BatchDecoder, outcomes: Counter
    ) -> None:
        self._bus = bus
        self._topic = catalogue.topic(VERSIONS)
        self._decoder = decoder
        self._outcomes = outcomes
        self._events = {
            name: pl.DataFrame(schema=frame_schema(catalogue.topic(kind.events).record))
            for name, kind in catalogue.event_types.items()
        }
        self._known: dict[tuple[str, int], Version] = {}
        self._rules: Mapping[str, frozenset[LabelRule]] = {}
        self.complete = False
        """Whether all that lay in the topic at the start has been read."""

    def get(self, model: str, version: int) -> Version | None:
        """A version; None when it is not known (yet)."""
        return self._known.get((model, version))

    def rules(self, event_type: str) -> frozenset[LabelRule]:
        """The label rules that read events of a type."""
        return self._rules.get(event_type, frozenset())

    def all(self) -> list[Version]:
        """Every known version, by model and number."""
        return [self._known[key] for key in sorted(self._known)]

    async def run(self) -> None:
        """Follow until cancelled."""
        await repeat("versions", self._follow, SystemClock(), 0.0)

    async def _follow(self) -> None:
        left = {source: end for source, end in (await self._ends()).items() if end > BEFORE_FIRST}
        reader = self._bus.reader(
            {(VERSIONS, number): BEFORE_FIRST for number in range(self._topic.partitions)}
        )
        try:
            while True:
                self.complete |= not left
                for raw in await reader.fetch(_FETCH, _WAIT_S):
                    await self._take(raw)
                    source = (raw.topic, raw.partition)
                    if int(raw.positions[-1]) >= left.get(source, BEFORE_FIRST):
                        left.pop(source, None)
        finally:
            await reader.close()

    async def _ends(self) -> dict[TopicPartition, int]:
        admin = self._bus.admin()
        try:
            await admin.ensure([self._topic])
            return await admin.ends([VERSIONS])
        finally:
            await admin.close()

    async def _take(self, raw: RawBatch) -> None:
        values = [value for value in raw.values if value is not None]
        decoded = await self._decoder.decode(values, self._topic.record)
        self._outcomes.labels("version", "undecodable").inc(len(decoded.bad))
        for record in decoded.frame.iter_rows(named=True):
            self.learn(record)

    def learn(self, record: Mapping[str, Any]) -> None:
        """Take one registration; the highest sequence of a version wins."""
        version = read_version(record, self._events)
        key = (version.model, version.version)
        known = self._known.get(key)
        if known is not None and known.sequence >= version.sequence:
            return
        self._known[key] = version
        self._outcomes.labels("version", "unusable" if version.problem else "known").inc()
        rules: dict[str, set[LabelRule]] = {}
        for rule in (one.rule for one in self._known.values()):
            if rule is not None:
                rules.setdefault(rule.event_type, set()).add(rule)
        self._rules = {name: frozenset(found) for name, found in rules.items()}
