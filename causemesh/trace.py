"""Walking causes both ways across topics."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from causemesh.bus.base import Bus, RawBatch
from causemesh.catalogue import Catalogue
from causemesh.codec.base import BatchDecoder
from causemesh.log import LogReader
from causemesh.runner.batch import Batch

_FETCH = 20_000
_WAIT_S = 0.3
_DEEPEST = 20
OUTBOX = "outbox."


@dataclass(frozen=True)
class Node:
    """One record of the log: where it lies, and its fields."""

    topic: str
    partition: int
    position: int
    record: dict[str, Any]

    @property
    def place(self) -> str:
        """topic[partition]@position."""
        return f"{self.topic}[{self.partition}]@{self.position}"

    @property
    def cause(self) -> tuple[str, int, int] | None:
        """The topic record that made this one; for an outbox row the record behind it."""
        cause = self.record.get("cause")
        if cause is None:
            return None
        if cause["topic"].startswith(OUTBOX):
            cause = cause["origin"]
        return None if cause is None else (cause["topic"], cause["partition"], cause["position"])


class Tracer:
    """Finds records by id and follows their causes and effects.

    Nothing is indexed: the log itself is read, raw where bytes can tell, by column where not.
    """

    def __init__(self, bus: Bus, catalogue: Catalogue, decoder: BatchDecoder) -> None:
        self._bus = bus
        self._catalogue = catalogue
        self._decoder = decoder
        self._log = LogReader(bus, catalogue, decoder)

    async def at(self, topic: str, partition: int, position: int) -> Node | None:
        """The record at a place."""
        batch = await self._log.one(topic, partition, position)
        return next(iter(_nodes(batch)), None) if batch is not None else None

    async def find(self, wanted: str, topics: Sequence[str] | None = None) -> list[Node]:
        """Records that carry the id: as event_id, or in another field that ends in _id.

        A record that was sent again after a crash is found once, where it came first.
        """
        names = list(topics) if topics is not None else sorted(self._catalogue.topics)
        found = []
        async for raw in self._holding(names, wanted.encode()):
            topic = self._catalogue.topic(raw.topic)
            decoded = await self._decoder.decode(raw.values, topic.record)
            batch = Batch(raw.topic, raw.partition, decoded.frame, decoded.rows, raw)
            found += [node for node in _nodes(batch) if _carries(node.record, wanted)]
        return _first_sent(found)

    async def _holding(self, topics: Sequence[str], needle: bytes) -> AsyncIterator[RawBatch]:
        """Raw records whose bytes hold `needle`."""
        spans = await self._log.ends(topics)
        left = {source: span.last for source, span in spans.items() if span.last > span.after}
        if not left:
            return
        reader = self._bus.reader({source: spans[source].after for source in left})
        try:
            while left:
                for raw in await reader.fetch(_FETCH, _WAIT_S):
                    rows = [n for n, value in enumerate(raw.values) if value and needle in value]
                    if rows:
                        yield _picked(raw, rows)
                    source = (raw.topic, raw.partition)
                    if source in left and int(raw.positions[-1]) >= left[source]:
                        del left[source]
        finally:
            await reader.close()

    async def causes(self, node: Node) -> list[Node]:
        """The chain of causes of a record, nearest first, down to what came from outside."""
        chain: list[Node] = []
        while node.cause is not None and len(chain) < _DEEPEST:
            found = await self.at(*node.cause)
            if found is None:
                break
            chain.append(found)
            node = found
        return chain

    async def effects(self, node: Node) -> list[Node]:
        """The records that name this one as their cause."""
        topic = self._catalogue.topic(node.topic)
        readers = set(topic.consumers)
        names = [
            name
            for name, one in self._catalogue.topics.items()
            if readers & set(one.producers) and one.form != "inbox" and name != node.topic
        ]
        found = []
        async for batch in self._log.read(await self._log.ends(names)):
            cause = pl.col("cause").struct
            direct = _matches(cause, node)
            behind = _matches(cause.field("origin").struct, node)
            kept = batch.frame.select(direct | behind.fill_null(False)).to_series()
            if kept.any():
                found += _nodes(batch.without(np.flatnonzero(~kept.to_numpy()).tolist()))
        return found


def _matches(cause: Any, node: Node) -> pl.Expr:
    expression: pl.Expr = (
        (cause.field("topic") == node.topic)
        & (cause.field("partition") == node.partition)
        & (cause.field("position") == node.position)
    )
    return expression


def _picked(raw: RawBatch, rows: list[int]) -> RawBatch:
    return RawBatch(
        raw.topic,
        raw.partition,
        raw.positions[rows],
        [raw.keys[row] for row in rows],
        [raw.values[row] for row in rows],
        raw.appended_at_us[rows],
    )


def _nodes(batch: Batch) -> list[Node]:
    return [
        Node(batch.topic, batch.partition, position, record)
        for position, record in zip(batch.positions.tolist(), batch.frame.to_dicts(), strict=True)
    ]


def _first_sent(nodes: Sequence[Node]) -> list[Node]:
    firsts: dict[tuple[str, int, str], Node] = {}
    for node in sorted(nodes, key=lambda node: (node.topic, node.partition, node.position)):
        event_id = str(node.record.get("event_id"))
        in_inbox = f"@{node.position}" if "cause" not in node.record else ""
        firsts.setdefault((node.topic, node.partition, event_id + in_inbox), node)
    return list(firsts.values())


def _carries(value: Any, wanted: str) -> bool:
    """Whether an id field somewhere in a record equals `wanted`."""
    if isinstance(value, list):
        return any(_carries(one, wanted) for one in value)
    if not isinstance(value, dict):
        return False
    return any(
        (name.endswith("_id") and one == wanted) or _carries(one, wanted)
        for name, one in value.items()
    )
