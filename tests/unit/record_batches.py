"""Kafka record batches, written by aiokafka's own builder."""

from __future__ import annotations

from collections.abc import Sequence

from aiokafka.record.default_records import DefaultRecordBatchBuilder

FIRST_MS = 1_700_000_000_000
LZ4 = 3


def record_batch(
    values: Sequence[bytes | None],
    *,
    base: int = 0,
    keys: Sequence[bytes | None] | None = None,
    headers: Sequence[Sequence[tuple[str, bytes]]] | None = None,
    offsets: Sequence[int] | None = None,
    codec: int = LZ4,
) -> bytes:
    """One batch; record n has offset `base` + n, or `base` + `offsets[n]`, and is 10 ms apart."""
    builder = DefaultRecordBatchBuilder(2, codec, 0, 1, 0, 0, 64 << 20)
    for number, value in enumerate(values):
        key = keys[number] if keys else b"k%d" % number
        told = list(headers[number]) if headers else []
        at = offsets[number] if offsets else number
        assert builder.append(at, FIRST_MS + 10 * number, key, value, told) is not None
    return base.to_bytes(8, "big") + bytes(builder.build())[8:]
