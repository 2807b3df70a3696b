"""A small mesh in memory: door -> event-time join -> sink, made of the real runner.

The sources carry out-of-order records and watermarks. The join answers a request with the set of
events of its key that lie before the start of the request's slice. Whatever crashes, pauses and
zombies happen, the sink must hold that answer for every request exactly once.
"""

from __future__ import annotations

import json
import pickle
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from causemesh.bus.base import Outbound, RawBatch
from causemesh.bus.memory import MemoryBus, Step
from causemesh.catalogue import WATERMARK, Catalogue, Topic
from causemesh.codec.base import Decoded
from causemesh.runner import Batch, Emission, Outgoing

SLICE_US = 5
END_US = 10**6
PARTITIONS = 2
KEYS = [b"ash", b"birch", b"cedar", b"elm"]

_ORIGIN = pl.Struct({"topic": pl.String, "partition": pl.Int32, "position": pl.Int64})
_DTYPES: dict[str, Any] = {
    "event_id": pl.String,
    "tenant_id": pl.String,
    "occurred_at": pl.Datetime("us", "UTC"),
    "cause": pl.Struct(
        {
            "topic": pl.String,
            "partition": pl.Int32,
            "position": pl.Int64,
            "index": pl.Int32,
            "origin": _ORIGIN,
        }
    ),
    "key": pl.String,
    "body": pl.String,
    "source_topic": pl.String,
    "source_partition": pl.Int32,
    "watermark_at": pl.Datetime("us", "UTC"),
}
_EXTERNAL = ("event_id", "tenant_id", "occurred_at", "key", "body")
_FACT = ("event_id", "tenant_id", "occurred_at", "cause", "key", "body")
_CONTROL = ("source_topic", "source_partition", "watermark_at")


def _record(name: str, columns: Sequence[str]) -> dict[str, Any]:
    return {"namespace": "sim", "name": name, "fields": [{"name": column} for column in columns]}


def _topic(name: str, form: Any, sources: Sequence[str]) -> Topic:
    record = _record("Row", _EXTERNAL if form == "inbox" else _FACT)
    people = ("door", "join", "sink")
    return Topic(
        name, form, record, "key", "door", people, people, tuple(sources), PARTITIONS, 1, "NONE", ""
    )


def catalogue() -> Catalogue:
    """Two kinds of input, events and requests, and the joined answers."""
    topics = [
        _topic("inbox.e", "inbox", ["inbox.e"]),
        _topic("inbox.r", "inbox", ["inbox.r"]),
        _topic("events.e", "fact", ["inbox.e"]),
        _topic("requests", "fact", ["inbox.r"]),
        _topic("answers", "fact", ["requests"]),
    ]
    control = {**_record("Watermark", _CONTROL), "namespace": "causemesh"}
    return Catalogue({topic.name: topic for topic in topics}, {}, {WATERMARK: control})


class PickleCodec:
    """Rows as pickles: the codec has tests of its own, the simulation wants speed."""

    async def decode(self, values: Sequence[bytes | None], reader: Mapping[str, Any]) -> Decoded:
        columns = tuple(field["name"] for field in reader["fields"])
        frame, good, foreign = _decoded(tuple(values), reader["name"], columns)
        return Decoded(frame, good, {}, {name: [*rows] for name, rows in foreign.items()})

    async def decode_log(self, raw: RawBatch, reader: Mapping[str, Any]) -> Decoded:
        return await self.decode(raw.values, reader)

    async def encoder(self, subject: str, schema: Mapping[str, Any]) -> _PickleEncoder:
        return _PickleEncoder(schema["name"])


@cache
def _empty(columns: tuple[str, ...]) -> pl.DataFrame:
    return pl.DataFrame(schema={column: _DTYPES[column] for column in columns})


@lru_cache(4096)
def _decoded(
    values: tuple[bytes | None, ...], record: str, columns: tuple[str, ...]
) -> tuple[pl.DataFrame, npt.NDArray[np.int64], Mapping[str, Sequence[int]]]:
    """What is good, where it lies, and what is foreign. Restarted workers read the same again."""
    rows: list[tuple[Any, ...]] = []
    good: list[int] = []
    foreign: dict[str, list[int]] = {}
    for number, value in enumerate(values):
        kind, row = pickle.loads(value or b"")
        if kind == record:
            rows.append(row)
            good.append(number)
        else:
            foreign.setdefault(f"causemesh.{kind}", []).append(number)
    frame = _empty(columns)
    if rows:
        frame = pl.DataFrame(rows, schema=frame.schema, orient="row")
    places = np.array(good, dtype=np.int64)
    places.flags.writeable = False  # it is told again
    return frame, places, foreign


class _PickleEncoder:
    def __init__(self, name: str) -> None:
        self._name = name

    def encode(self, frame: pl.DataFrame) -> list[bytes]:
        return [pickle.dumps((self._name, row)) for row in frame.rows()]


@dataclass(frozen=True)
class Source:
    """One inbox partition: rows (key, event time, body) and watermarks, and its encoded log."""

    rows: list[tuple[bytes, int, str]]
    values: list[bytes]
    keys: list[bytes | None]


def make_source(rng: random.Random, topic: str, partition: int, count: int) -> Source:
    """Records out of order by up to four microseconds, and true watermarks among them."""
    jittered = sorted(
        ((at := rng.randrange(60)) + rng.randint(0, 4), at, rng.randrange(len(KEYS)))
        for _ in range(count)
    )
    rows, values, keys = [], [], []
    for number, (_, at, key) in enumerate(jittered):
        body = f"{topic}/{partition}/{number}"
        rows.append((KEYS[key], at, body))
        row = (body, "t", _instant(at), KEYS[key].decode(), body)
        values.append(pickle.dumps(("Row", row)))
        keys.append(KEYS[key])
        if rng.random() < 0.4:
            later = [other for _, other, _ in jittered[number + 1 :]]
            values.append(_watermark(topic, partition, min(later, default=END_US)))
            keys.append(None)
    values.append(_watermark(topic, partition, END_US))
    keys.append(None)
    return Source(rows, values, keys)


def _watermark(topic: str, partition: int, at_us: int) -> bytes:
    return pickle.dumps(("Watermark", (topic, partition, _instant(at_us))))


@cache
def _instant(at_us: int) -> Any:
    return pl.Series([at_us], dtype=pl.Int64).cast(pl.Datetime("us", "UTC"))[0]


async def fill(bus: MemoryBus, sources: Mapping[tuple[str, int], Source]) -> None:
    """Create every topic and write the inbox partitions."""
    for topic in catalogue().topics.values():
        bus.create(topic.name, topic.partitions)
    producer = bus.producer("outside")
    for (topic, partition), source in sources.items():
        await producer.send([Outbound(topic, partition, source.keys, source.values)])


class Door:
    """Re-keys: inbox rows to the partition of their key."""

    takes_bad_rows = False
    stateful = False

    async def process(
        self, batches: Sequence[Batch], watermark_us: int, transaction: Any
    ) -> Emission:
        return Emission([self._pass(batch) for batch in batches])

    @staticmethod
    def _pass(batch: Batch) -> Outgoing:
        target = "events.e" if batch.topic == "inbox.e" else "requests"
        keys: list[bytes | None] = [key.encode() for key in batch.frame["key"]]
        return Outgoing(target, batch.frame, keys, batch.topic, batch.partition, batch.positions)

    def snapshot(self) -> bytes | None:
        return None

    def restore(self, state: bytes | None) -> None:
        """Nothing to restore."""


class Join:
    """Computes by event time, emits by position, commits its buffers."""

    takes_bad_rows = False
    stateful = True

    def __init__(self, *, by_position: bool = True, keep_buffers: bool = True) -> None:
        self._by_position = by_position
        self._keep_buffers = keep_buffers
        self._partition = 0
        self._seen: dict[str, list[str]] = {}
        self._events: list[list[Any]] = []
        self._requests: list[list[Any]] = []  # unanswered: [at, key, body, position]
        self._answered: dict[int, list[Any]] = {}

    async def process(
        self, batches: Sequence[Batch], watermark_us: int, transaction: Any
    ) -> Emission:
        for batch in batches:
            self._partition = batch.partition
            self._buffer(batch)
        order = self._answer(watermark_us)
        ready = self._ready(order)
        floor = min(
            [row[0] for row in self._requests]
            + [answer[3] for answer in self._answered.values()]
            + [watermark_us]
        )
        outgoing = [self._outgoing(ready)] if ready else []
        return Emission(outgoing, {"requests": floor})

    def _buffer(self, batch: Batch) -> None:
        at = batch.occurred_at_us.tolist()
        rows = zip(
            at, batch.frame["key"], batch.frame["body"], batch.positions.tolist(), strict=True
        )
        target = self._events if batch.topic == "events.e" else self._requests
        target.extend([list(row) for row in rows])

    def _answer(self, watermark_us: int) -> list[int]:
        """Answer whole slices below the watermark; returns positions in the order answered."""
        order = []
        for start in range(0, 100, SLICE_US):
            if start + SLICE_US > watermark_us:
                break
            due = sorted(row for row in self._requests if row[0] // SLICE_US * SLICE_US == start)
            for at, key, body, position in due:
                self._answered[position] = [
                    position,
                    key,
                    body,
                    at,
                    sorted(self._seen.get(key, [])),
                ]
                order.append(position)
            self._requests = [row for row in self._requests if row[0] >= start + SLICE_US]
            for row in [row for row in self._events if row[0] < start + SLICE_US]:
                self._seen.setdefault(row[1], []).append(row[2])
            self._events = [row for row in self._events if row[0] >= start + SLICE_US]
        return order

    def _ready(self, order: list[int]) -> list[list[Any]]:
        if not self._by_position:
            return [self._answered.pop(position) for position in order]
        waiting = min((row[3] for row in self._requests), default=END_US)
        positions = sorted(position for position in self._answered if position < waiting)
        return [self._answered.pop(position) for position in positions]

    def _outgoing(self, ready: list[list[Any]]) -> Outgoing:
        frame = pl.DataFrame(
            {
                "tenant_id": ["t"] * len(ready),
                "occurred_at": pl.Series([row[3] for row in ready], dtype=pl.Int64).cast(
                    pl.Datetime("us", "UTC")
                ),
                "key": [row[1] for row in ready],
                "body": [json.dumps([row[2], row[4]]) for row in ready],
            }
        )
        positions = np.array([row[0] for row in ready], dtype=np.int64)
        keys: list[bytes | None] = [row[1].encode() for row in ready]
        return Outgoing("answers", frame, keys, "requests", self._partition, positions)

    def snapshot(self) -> bytes | None:
        if not self._keep_buffers:
            return pickle.dumps((self._partition, self._seen, [], [], {}))
        return pickle.dumps(
            (self._partition, self._seen, self._events, self._requests, self._answered)
        )

    def restore(self, state: bytes | None) -> None:
        if state is not None:
            stored = pickle.loads(state)
            self._partition, self._seen, self._events, self._requests, self._answered = stored


class Sink:
    """Writes each answer as an effect of its unit."""

    takes_bad_rows = False
    stateful = False

    async def process(
        self, batches: Sequence[Batch], watermark_us: int, transaction: Any
    ) -> Emission:
        for batch in batches:
            transaction.extend(json.loads(body) for body in batch.frame["body"])
        return Emission()

    def snapshot(self) -> bytes | None:
        return None

    def restore(self, state: bytes | None) -> None:
        """Nothing to restore."""


def expected(sources: Mapping[tuple[str, int], Source]) -> dict[str, list[str]]:
    """The pure answer: for each request the events of its key before its slice."""
    events = [
        row for (topic, _), source in sources.items() if topic == "inbox.e" for row in source.rows
    ]
    requests = [
        row for (topic, _), source in sources.items() if topic == "inbox.r" for row in source.rows
    ]
    return {
        body: sorted(
            seen
            for other, when, seen in events
            if other == key and when < at // SLICE_US * SLICE_US
        )
        for key, at, body in requests
    }


def make_bus(step: Step) -> MemoryBus:
    """A bus whose every visible step the simulation owns."""
    return MemoryBus(step)
