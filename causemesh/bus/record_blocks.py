"""Record batches as they lie in Kafka's log: parsed when somebody asks for a record, not before.

Whoever reads columns decodes a block as a whole (`causemesh.codec.log_block`) and never needs an
object a record. Layout: https://kafka.apache.org/documentation/#recordbatch
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, overload

import numpy as np
from aiokafka.codec import gzip_decode, lz4_decode, snappy_decode, zstd_decode
from aiokafka.errors import CorruptRecordException
from aiokafka.record.default_records import DefaultRecordBatch
from aiokafka.record.util import calc_crc32c

from causemesh.bus.base import TRACEPARENT, Positions, RawBatch
from causemesh.errors import Fatal

_HEAD = struct.Struct(">qiibIhiqqqhii")
_LENGTH_AT, _BEFORE_LENGTH, _CRC_FROM = 8, 12, 21
_MAGIC = 2
_CODEC, _APPEND_TIME, _CONTROL = 0x07, 0x08, 0x20
_DECOMPRESS: dict[int, Callable[[bytes], bytes]] = {
    0: bytes,
    1: gzip_decode,
    2: snappy_decode,
    3: lz4_decode,
    4: zstd_decode,
}


class RecordBlock:
    """One record batch. All sequences have one length, `len(block)`."""

    def __init__(self, batch: bytes, *, after: int = -1) -> None:
        """`batch` is whole, its checksum verified; records up to offset `after` are left out."""
        head = _HEAD.unpack_from(batch)
        self._batch = batch
        self._base, self._attributes = head[0], head[5]
        self._last_delta, self._first_ms, self._latest_ms = head[6], head[7], head[8]
        self._count = head[12]
        self._after = after
        # Whether all that it was written with is here, so that the offsets follow each other.
        self._whole = self._last_delta + 1 == self._count and after < self._base
        self._columns: tuple[Any, ...] | None = None
        self._keys: Callable[[], Sequence[bytes | None]] | None = None
        self._traces: Callable[[], Sequence[bytes | None] | None] | None = None
        if after >= self._base:
            self._count = len(self._parse()[0])

    def __len__(self) -> int:
        return int(self._count)

    @property
    def control(self) -> bool:
        """Whether it marks the end of a transaction instead of holding records."""
        return bool(self._attributes & _CONTROL)

    @property
    def next_offset(self) -> int:
        """The offset behind it."""
        return int(self._base + self._last_delta + 1)

    @property
    def payload(self) -> bytes | None:
        """The records as they lie in the log, uncompressed; None when some are missing."""
        if not self._whole:
            return None
        return _DECOMPRESS[self._attributes & _CODEC](self._batch[_HEAD.size :])

    def known(
        self,
        keys: Callable[[], Sequence[bytes | None]],
        traces: Callable[[], Sequence[bytes | None] | None],
    ) -> None:
        """Take the keys and trace contexts from who has decoded the payload."""
        self._keys, self._traces = keys, traces

    @cached_property
    def positions(self) -> Positions:
        """The offsets."""
        if self._whole:
            return np.arange(self._base, self._base + self._count, dtype=np.int64)
        return np.array(self._parse()[0], dtype=np.int64)

    @cached_property
    def keys(self) -> Sequence[bytes | None]:
        """The message keys."""
        return self._keys() if self._keys is not None else self._parse()[1]

    @property
    def values(self) -> Sequence[bytes | None]:
        """The values."""
        values: Sequence[bytes | None] = self._parse()[2]
        return values

    @cached_property
    def appended_at_us(self) -> Positions:
        """The broker's append time, microseconds."""
        if self._attributes & _APPEND_TIME or (self._whole and self._count == 1):
            return np.full(self._count, self._latest_ms * 1000, dtype=np.int64)
        return np.array(self._parse()[3], dtype=np.int64) * 1000

    @property
    def traceparents(self) -> Sequence[bytes | None] | None:
        """The trace contexts; None where no record has one."""
        if self._traces is not None:
            return self._traces()
        headers = self._parse()[4]
        return [dict(one).get(TRACEPARENT) for one in headers] if any(headers) else None

    def split(self, count: int) -> tuple[RecordBlock, RecordBlock]:
        """The first `count` records and the others."""
        last = int(self.positions[count - 1])
        head, rest = (RecordBlock(self._batch, after=at) for at in (self._after, last))
        head._keep(count)
        return head, rest

    def _keep(self, count: int) -> None:
        self._columns = tuple(column[:count] for column in self._parse())
        self._whole, self._count = False, count
        self._last_delta = self._columns[0][-1] - self._base

    def _parse(self) -> tuple[Any, ...]:
        """Offsets, keys, values, times in milliseconds and headers, by aiokafka's decoder."""
        if self._columns is None:
            found = [one for one in DefaultRecordBatch(self._batch) if one.offset > self._after]
            self._columns = (
                [one.offset for one in found],
                [one.key for one in found],
                [one.value for one in found],
                [one.timestamp for one in found],
                [one.headers for one in found],
            )
        return self._columns


def blocks(records: bytes, offset: int) -> Iterator[RecordBlock]:
    """The whole batches of a fetch, from `offset` on.

    Raises CorruptRecordException when a checksum is wrong, Fatal for batches older than Kafka 0.11.
    """
    at = 0
    while len(records) - at >= _BEFORE_LENGTH:
        (length,) = struct.unpack_from(">i", records, at + _LENGTH_AT)
        end = at + _BEFORE_LENGTH + length
        if end > len(records):
            return  # cut off by the size asked for; it comes whole with the next fetch
        batch = records[at:end]
        at = end
        if batch[16] != _MAGIC:
            raise Fatal("the topic holds record batches from before Kafka 0.11: write it anew")
        if calc_crc32c(batch[_CRC_FROM:]) != struct.unpack_from(">I", batch, 17)[0]:
            raise CorruptRecordException("a record batch has a wrong checksum")
        yield RecordBlock(batch, after=offset - 1)


class LazyColumn(Sequence[bytes | None]):
    """One column over several blocks; a row parses only its own block."""

    def __init__(self, parts: Sequence[RecordBlock], column: str) -> None:
        self._parts, self._column = parts, column
        self._ends = np.cumsum([len(part) for part in parts]).tolist()
        self._whole: list[bytes | None] | None = None

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._ends else 0

    @overload
    def __getitem__(self, row: int) -> bytes | None: ...
    @overload
    def __getitem__(self, row: slice) -> list[bytes | None]: ...
    def __getitem__(self, row: int | slice) -> bytes | list[bytes | None] | None:
        if isinstance(row, slice):
            return self._all()[row]
        number = range(len(self))[row]
        part = bisect_right(self._ends, number)
        before = self._ends[part - 1] if part else 0
        found: bytes | None = getattr(self._parts[part], self._column)[number - before]
        return found

    def __iter__(self) -> Iterator[bytes | None]:
        return iter(self._all())

    def _all(self) -> list[bytes | None]:
        if self._whole is None:
            self._whole = [one for part in self._parts for one in getattr(part, self._column)]
        return self._whole


class LogBatch(RawBatch):
    """Records of one partition, in blocks."""

    _parts: Sequence[RecordBlock]

    def __init__(
        self, topic: str, partition: int, parts: Sequence[RecordBlock], *, more: bool = False
    ) -> None:
        positions = [part.positions for part in parts]
        fields = {
            "topic": topic,
            "partition": partition,
            "blocks": parts,
            "_parts": parts,
            "positions": positions[0] if len(parts) == 1 else np.concatenate(positions),
            "keys": LazyColumn(parts, "keys"),
            "values": LazyColumn(parts, "values"),
            "more": more,
        }
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    def __len__(self) -> int:
        return len(self.positions)

    @cached_property
    def appended_at_us(self) -> Positions:
        """See `RawBatch`."""
        return np.concatenate([part.appended_at_us for part in self._parts])

    @cached_property
    def traceparents(self) -> Sequence[bytes | None] | None:
        """See `RawBatch`."""
        found = [(len(part), part.traceparents) for part in self._parts]
        if all(traces is None for _, traces in found):
            return None
        return [one for count, traces in found for one in traces or [None] * count]
