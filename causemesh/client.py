"""Produce events and requests from your own code.

```python
async with connect(project=Path("examples/flights")) as mesh:
    await mesh.produce("weather_observed", [{"event_id": "1", "tenant_id": "t", ...}])
    await mesh.request([{"event_id": "r1", "tenant_id": "t", "model": "late-arrival", ...}])
```
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from causemesh.bus.base import Outbound, Producer
from causemesh.bus.opening import open_bus
from causemesh.bus.partitioner import partitions_of
from causemesh.catalogue import WATERMARK, Catalogue, Topic
from causemesh.codec.base import BatchEncoder
from causemesh.codec.encode import Encoder
from causemesh.codec.registry import HttpRegistry, Registry
from causemesh.codec.rows import RowEncoder
from causemesh.settings import ServiceSettings

REQUESTS = "inbox.requests"
Rows = pl.DataFrame | Sequence[Mapping[str, Any]]
_FEW = 32  # so few rows cost less one by one than the query engine does a call (measured)


class Client:
    """Writes inbox topics. Records with one key stay in order; a retry must reuse its event_id."""

    def __init__(self, catalogue: Catalogue, registry: Registry, producer: Producer) -> None:
        self.catalogue = catalogue
        self._registry = registry
        self._producer = producer
        self._ids: dict[str, int] = {}
        self._encoders: dict[str, BatchEncoder] = {}
        self._lock = asyncio.Lock()

    async def produce(
        self, event_type: str, events: Rows, *, traceparent: bytes | None = None
    ) -> int:
        """Write events of a declared type; returns how many, once all are acknowledged.

        A frame has the columns of the inbox record (hot path); rows are JSON-like, instants as
        ISO 8601 text. Raises Misdeclared for an unknown type, ValueError for a row that does not
        fit, Retryable when the broker is away. `traceparent` is the W3C trace context of the call.
        """
        return await self._write(self.catalogue.topic(f"inbox.{event_type}"), events, traceparent)

    async def request(self, requests: Rows, *, traceparent: bytes | None = None) -> int:
        """Write prediction requests; see `produce`. The event_id is the request id."""
        return await self._write(self.catalogue.topic(REQUESTS), requests, traceparent)

    async def watermark(self, event_type: str, at: datetime | int) -> None:
        """Promise that no event of this type before `at` will follow (UTC, or microseconds).

        Only for event types with `watermark: source`; `requests` is a type here too.
        """
        topic = self.catalogue.topic(f"inbox.{event_type}")
        at_us = at if isinstance(at, int) else round(at.timestamp() * 1_000_000)
        encoder = await self._encoder(WATERMARK, self.catalogue.controls[WATERMARK])
        count = topic.partitions
        frame = pl.DataFrame(
            {
                "source_topic": [topic.name] * count,
                "source_partition": pl.Series(range(count), dtype=pl.Int32),
                "watermark_at": pl.Series([at_us] * count).cast(pl.Datetime("us", "UTC")),
            }
        )
        values = encoder.encode(frame)
        await self._producer.send(
            [Outbound(topic.name, n, [None], [values[n]]) for n in range(count)]
        )

    async def _write(self, topic: Topic, records: Rows, traceparent: bytes | None) -> int:
        if isinstance(records, pl.DataFrame):
            encoder = await self._encoder(topic.subject, topic.record)
            values, keys = encoder.encode(records), _frame_keys(topic, records)
        else:
            schema_id = await self._schema_id(topic.subject, topic.record)
            single = RowEncoder(topic.record, schema_id)
            values = [single.encode(row) for row in records]
            keys = [row_key(topic, row) for row in records]
        await self._producer.send(outbound(topic, keys, values, traceparent))
        return len(values)

    async def _schema_id(self, subject: str, schema: Mapping[str, Any]) -> int:
        async with self._lock:
            if subject not in self._ids:
                self._ids[subject] = await self._registry.register(subject, schema)
        return self._ids[subject]

    async def _encoder(self, subject: str, schema: Mapping[str, Any]) -> BatchEncoder:
        if subject not in self._encoders:
            self._encoders[subject] = Encoder(schema, await self._schema_id(subject, schema))
        return self._encoders[subject]


def outbound(
    topic: Topic,
    keys: Sequence[bytes | None],
    values: Sequence[bytes],
    traceparent: bytes | None = None,
) -> list[Outbound]:
    """Framed values by partition of their key, all with one trace context or none."""
    chosen = partitions_of(keys, topic.partitions, unkeyed=0)
    return [
        Outbound(
            topic.name,
            number,
            [keys[r] for r in rows],
            [values[r] for r in rows],
            [traceparent] * len(rows) if traceparent else None,
        )
        for number in range(topic.partitions)
        if len(rows := np.flatnonzero(chosen == number).tolist())
    ]


def row_key(topic: Topic, row: Mapping[str, Any]) -> bytes:
    """The message key of one inbox row: its key column, or a request's first entity."""
    if topic.name == REQUESTS:
        entities = row.get("entities") or [{}]
        value = entities[0].get("value")
    else:
        value = row.get(topic.key)
    return str(row["event_id"] if value is None else value).encode()


def request_keys(frame: pl.DataFrame) -> pl.Series:
    """The routing key of requests: the first entity's value, or the id where it has none."""
    if frame.height <= _FEW:
        pairs = zip(frame["entities"].to_list(), frame["event_id"].to_list(), strict=True)
        return pl.Series("key", [_request_key(*pair) for pair in pairs], dtype=pl.String)
    values = frame["entities"].list.first().struct.unnest()["value"]
    if values.null_count():
        values = values.zip_with(values.is_not_null(), frame["event_id"])
    return values.alias("key")


def _request_key(entities: Sequence[Mapping[str, Any]] | None, event_id: str) -> str:
    value = entities[0]["value"] if entities else None
    return event_id if value is None else str(value)


def _frame_keys(topic: Topic, frame: pl.DataFrame) -> list[bytes | None]:
    if topic.name == REQUESTS:
        keys = request_keys(frame)
    else:
        keys = frame.select(
            pl.coalesce(pl.col(topic.key).cast(pl.String), pl.col("event_id"))
        ).to_series()
    return [None if key is None else key.encode() for key in keys.to_list()]


@asynccontextmanager
async def connect(
    project: Path | None = None, settings: ServiceSettings | None = None
) -> AsyncIterator[Client]:
    """A client for the mesh that the CAUSEMESH_* settings (default: the local cluster) name."""
    told = settings or ServiceSettings()
    folder = project or told.project
    catalogue = Catalogue.load([folder] if folder else [], partitions=told.partitions)
    async with AsyncExitStack() as stack:
        bus = open_bus(told)
        stack.push_async_callback(bus.close)
        registry = HttpRegistry(told.registry_url)
        stack.push_async_callback(registry.close)
        producer = bus.producer("causemesh-client")
        stack.push_async_callback(producer.close)
        yield Client(catalogue, registry, producer)
