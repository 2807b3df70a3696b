"""Decoding a block of Kafka's log as columns, without an object a record.

Kafka's record (format 2) is itself made of Avro's pieces: zigzag varints, bytes behind their
length, one fixed byte. So a batch of records that have one writer schema is a block of Avro records
whose fields are the record's own and, in the place of its value, the five bytes of framing and the
fields of the writer schema: polars reads all of it at once.

    length attributes time offset | key | length(value) 0 schema-id <writer's fields> | headers

It is checked by what surrounds each body: framing, attributes, number of headers, offsets that rise
by one, and lengths that add up to the block's. A body that is too short or too long shifts what
follows, which no longer fits; so that something follows the last one, the first record is read
again behind it. That finds accidents, not forgeries: who may write a body of his choice could hide
another record in it. So this is for topics that only the mesh writes; what comes from outside is
decoded with guards (`block.py`).
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from causemesh.bus.base import TRACEPARENT, LogBlock
from causemesh.codec.block import container
from causemesh.codec.wire import HEADER_BYTES
from causemesh.codec.wire import header as framing

_PREFIX = "causemesh_log_"
_LENGTH, _ATTRIBUTES, _TIME, _OFFSET, _KEY, _VALUE, _FRAMING, _HEADERS, _NAME, _TRACE = (
    _PREFIX + name
    for name in (
        *("length", "attributes", "time", "offset", "key", "value"),
        *("framing", "headers", "name", "trace"),
    )
)


@dataclass(frozen=True)
class Form:
    """What all records of a block have in common: their schema, whether they have a key, and how
    many headers (0 or 1, which is the trace context)."""

    schema_id: int
    keyed: bool
    headers: int


def form_of(payload: bytes) -> Form | None:
    """The form of the first record; None when it is one that is not read as a block."""
    try:
        at = _skip(payload, 0)  # length
        at = _skip(payload, _skip(payload, at + 1))  # attributes, time, offset
        key, at = _long(payload, at)
        value, at = _long(payload, at + max(key, 0))
        headers, _ = _long(payload, at + max(value, 0))
    except IndexError:
        return None
    if value < HEADER_BYTES or payload[at] != 0 or headers not in (0, 1):
        return None
    schema_id = int.from_bytes(payload[at + 1 : at + HEADER_BYTES], "big")
    return Form(schema_id, key >= 0, headers)


class LogBlockReader:
    """Reads blocks of one writer schema and form; `checked=False` exists for its control arm."""

    def __init__(self, writer: Mapping[str, Any], form: Form, *, checked: bool = True) -> None:
        self._form = form
        self._checked = checked
        fields = [
            _field(_LENGTH, "long"),
            _field(_ATTRIBUTES, _fixed(1)),
            _field(_TIME, "long"),
            _field(_OFFSET, "long"),
            _field(_KEY, "bytes" if form.keyed else "long"),
            _field(_VALUE, "long"),
            _field(_FRAMING, _fixed(HEADER_BYTES)),
            *writer["fields"],
            _field(_HEADERS, "long"),
            *([_field(_NAME, "bytes"), _field(_TRACE, "bytes")] if form.headers else []),
        ]
        self._names = [field["name"] for field in writer["fields"]]
        self._wrap = container({**writer, "fields": fields})

    def read(self, block: LogBlock, payload: bytes, max_value_bytes: int) -> pl.DataFrame | None:
        """The writer's columns of all records; None when they have to be read another way."""
        count = read = len(block)
        if self._checked:
            length, at = _long(payload, 0)
            payload += payload[: at + length]
            read += 1
        try:
            frame = pl.read_avro(io.BytesIO(self._wrap(payload, read)))
        except (KeyboardInterrupt, SystemExit, asyncio.CancelledError):
            raise
        except BaseException:  # noqa: BLE001 - polars panics are not Exceptions; see `decode.py`
            return None
        if frame.height != read:
            return None
        if self._checked and not self._fits(frame, payload, max_value_bytes):
            return None
        frame = frame.head(count)
        keys = frame[_KEY].to_list if self._form.keyed else _nothing(count)
        block.known(keys, frame[_TRACE].to_list if self._form.headers else _no_traces)
        return frame.select(self._names)

    def _fits(self, frame: pl.DataFrame, payload: bytes, max_value_bytes: int) -> bool:
        lengths = frame[_LENGTH].to_numpy()
        offsets = np.arange(len(lengths))
        offsets[-1] = 0
        return (
            int(lengths.sum()) + _long_bytes(lengths) == len(payload)
            and bool((frame[_OFFSET].to_numpy() == offsets).all())
            and bool((frame[_HEADERS].to_numpy() == self._form.headers).all())
            and _all(frame[_ATTRIBUTES], b"\0")
            and _all(frame[_FRAMING], framing(self._form.schema_id))
            and int(frame[_VALUE].max()) <= max_value_bytes  # type: ignore[arg-type]
            and (self._form.keyed or bool((frame[_KEY].to_numpy() == -1).all()))
            and (not self._form.headers or _all(frame[_NAME], TRACEPARENT.encode()))
        )


def _all(column: pl.Series, value: bytes) -> bool:
    return bool((column == pl.Series([value], dtype=pl.Binary)).all())


def _no_traces() -> None:
    return None


def _nothing(count: int) -> Callable[[], Sequence[None]]:
    return lambda: [None] * count


def _field(name: str, kind: Any) -> dict[str, Any]:
    return {"name": name, "type": kind}


def _fixed(size: int) -> dict[str, Any]:
    return {"type": "fixed", "name": f"{_PREFIX}fixed{size}", "size": size}


def _long_bytes(numbers: np.ndarray[Any, Any]) -> int:
    """How many bytes the zigzag varints of numbers >= 0 take together."""
    limits = [1 << (7 * size - 1) for size in range(1, 10)]
    return len(numbers) + int(np.searchsorted(limits, numbers, side="right").sum())


def _long(payload: bytes, at: int) -> tuple[int, int]:
    """The zigzag varint at `at`, and where it ends."""
    number = shift = 0
    while True:
        byte = payload[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return (number >> 1) ^ -(number & 1), at
        shift += 7


def _skip(payload: bytes, at: int) -> int:
    return _long(payload, at)[1]
