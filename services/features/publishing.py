"""Current vectors to features.vectors.v1: state for anyone, coalesced by entity."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import numpy as np
import polars as pl

from causemesh.catalogue import NO_TENANT
from causemesh.clock import Clock
from causemesh.runner import NEVER, Batch, Outgoing
from services.features.domain.engine import ViewState
from services.features.domain.events import SEPARATOR, Ints
from services.features.domain.feature_store import FeatureStore
from services.features.domain.vectors import row_bytes
from services.features.rekeying import INPUTS

VECTORS = "features.vectors.v1"


class VectorPublisher:
    """Collects the entities whose state changed and sends their vectors now and then.

    A broadcast view is held by every partition, so each entity is published by one of them: its
    key's checksum modulo the partition count. A record's sequence is the event time up to which
    its view was applied, so a reader keeps the highest. `seconds` None publishes nothing.
    """

    def __init__(
        self,
        store: FeatureStore,
        partition: int,
        partitions: int,
        clock: Clock,
        seconds: float | None,
    ) -> None:
        self._store = store
        self._partition = partition
        self._partitions = partitions
        self._clock = clock
        self._seconds = seconds
        self._touched: dict[str, list[Ints]] = {}
        self._causes: dict[str, tuple[str, int, int]] = {}
        self._next = 0.0

    def heard(self, batch: Batch) -> None:
        """Remember the newest input record of a topic: the cause of what is published next."""
        if len(batch):
            at = (batch.topic, batch.partition, int(batch.positions[-1]))
            self._causes[batch.topic] = at

    def touch(self, touched: Mapping[str, Ints]) -> None:
        """Note the rows whose state changed, by view."""
        if self._seconds is None:
            return
        for name, rows in touched.items():
            self._touched.setdefault(name, []).append(rows)

    def due(self, as_of_us: int) -> list[Outgoing]:
        """The vectors to send now, as of a watermark (microseconds)."""
        now = self._clock.monotonic()
        if not self._touched or as_of_us == NEVER or self._seconds is None or now < self._next:
            return []
        self._next = now + self._seconds
        touched, self._touched = self._touched, {}
        sends = []
        for name, rows in touched.items():
            state = self._store.views[name]
            cause = self._causes.get(self._input_of(state))
            if cause is None:  # nothing read since the restart: wait for a record to name
                self._touched[name] = rows
            else:
                sends.append(self._view(state, np.unique(np.concatenate(rows)), as_of_us, cause))
        return [one for one in sends if len(one)]

    def _input_of(self, state: ViewState) -> str:
        rekeyed = state.view.placement == "rekeyed"
        return INPUTS if rekeyed else f"events.{state.view.event_type}"

    def _view(
        self, state: ViewState, touched: Ints, as_of_us: int, cause: tuple[str, int, int]
    ) -> Outgoing:
        names = [name for name in state.index.keys_of(touched) if name is not None]
        if state.view.placement == "broadcast":
            names = [name for name in names if self._is_ours(state, name)]
        matrix = state.answer(names, np.full(len(names), as_of_us, dtype=np.int64))
        frame = pl.DataFrame(
            {
                "tenant_id": pl.Series([_tenant(state, n) for n in names], dtype=pl.String),
                "occurred_at": pl.Series([as_of_us] * len(names), dtype=pl.Int64).cast(
                    pl.Datetime("us", "UTC")
                ),
                "view": pl.Series([state.view.id] * len(names), dtype=pl.String),
                "entity": pl.Series(names, dtype=pl.String),
                "vector": pl.Series(row_bytes(matrix), dtype=pl.Binary),
                "sequence": pl.Series([as_of_us] * len(names), dtype=pl.Int64),
            }
        )
        topic, partition, position = cause
        positions = np.full(len(names), position, dtype=np.int64)
        indexes = np.arange(len(names), dtype=np.int32)
        prefix = f"{state.view.id}{SEPARATOR}"
        message_keys: list[bytes | None] = [f"{prefix}{name}".encode() for name in names]
        return Outgoing(VECTORS, frame, message_keys, topic, partition, positions, indexes)

    def _is_ours(self, state: ViewState, name: str) -> bool:
        text = f"{state.view.id}{SEPARATOR}{name}".encode()
        return zlib.crc32(text) % self._partitions == self._partition


def _tenant(state: ViewState, name: str) -> str:
    return name.split(SEPARATOR, 1)[0] if state.view.scope == "tenant" else NO_TENANT
