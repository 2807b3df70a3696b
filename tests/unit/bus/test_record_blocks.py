"""Record batches are read as aiokafka reads them, whole, cut and with records left out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from aiokafka.errors import CorruptRecordException
from aiokafka.record.default_records import DefaultRecordBatch
from hypothesis import given, settings
from hypothesis import strategies as st

from causemesh.bus.base import TRACEPARENT, picked
from causemesh.bus.record_blocks import LogBatch, RecordBlock, blocks
from causemesh.errors import Fatal
from tests.unit.record_batches import FIRST_MS, record_batch

CODECS = [0, 1, 2, 3, 4]
CONTROL_AT, CONTROL = 22, 0x20

records = st.lists(
    st.tuples(
        st.none() | st.binary(max_size=20),
        st.none() | st.binary(max_size=200),
        st.lists(st.tuples(st.sampled_from([TRACEPARENT, "other"]), st.binary(max_size=9))),
    ),
    min_size=1,
    max_size=20,
)


def seen(batch: LogBatch) -> list[tuple[Any, ...]]:
    traces = batch.traceparents or [None] * len(batch)
    appended = (batch.appended_at_us // 1000).tolist()
    columns = (batch.positions.tolist(), batch.keys, batch.values, appended, traces)
    return list(zip(*columns, strict=True))


def expected(*batches: bytes) -> list[tuple[Any, ...]]:
    return [
        (one.offset, one.key, one.value, one.timestamp, dict(one.headers).get(TRACEPARENT))
        for batch in batches
        for one in DefaultRecordBatch(batch)
    ]


@pytest.mark.parametrize("count", [0, 1, 4, 5, 9])
def test_rows_are_picked_from_lazy_columns_one_by_one_or_all_at_once(count: int) -> None:
    values = [b"v%d" % number for number in range(9)]
    parts = [RecordBlock(record_batch(values[:5])), RecordBlock(record_batch(values[5:], base=5))]
    batch, rows = LogBatch("t", 0, parts), list(range(8, 8 - count, -1))
    assert picked(batch.values, rows) == picked(values, rows) == [values[row] for row in rows]
    # one by one, a block without a row that was asked for stays as it lay in the log
    assert (parts[0]._columns is None) == (count <= 4)


@settings(max_examples=100, deadline=None)
@given(st.lists(records, min_size=1, max_size=4), st.sampled_from(CODECS), st.data())
def test_a_fetch_holds_what_aiokafka_reads(written: list[Any], codec: int, data: Any) -> None:
    batches, base = [], 0
    for rows in written:
        keys, values, headers = zip(*rows, strict=True)
        batches.append(record_batch(values, base=base, keys=keys, headers=headers, codec=codec))
        base += len(rows)
    cut = data.draw(st.integers(0, len(batches[-1]) - 1))
    after = data.draw(st.integers(0, base))
    whole = expected(*batches)
    found = list(blocks(b"".join(batches) + batches[-1][:cut], after))
    parts = [part for part in found if len(part)]
    assert found[-1].next_offset == base
    kept = [one for one in whole if one[0] >= after]
    assert (seen(LogBatch("t", 0, parts)) if parts else []) == kept


@settings(max_examples=60, deadline=None)
@given(records, st.data())
def test_a_block_is_split_anywhere(rows: Any, data: Any) -> None:
    keys, values, headers = zip(*rows, strict=True)
    batch = record_batch(values, base=100, keys=keys, headers=headers)
    at = data.draw(st.integers(1, len(rows)))
    head, rest = RecordBlock(batch).split(at)
    assert (len(head), len(rest)) == (at, len(rows) - at)
    assert head.next_offset == 100 + at
    assert head.payload is None
    assert rest.payload is None
    parts = [part for part in (head, rest) if len(part)]
    assert seen(LogBatch("t", 0, parts)) == expected(batch)


def test_offsets_that_compaction_left_out() -> None:
    batch = record_batch([b"a", b"b", b"c"], base=10, offsets=[0, 4, 9])
    block = RecordBlock(batch)
    assert block.positions.tolist() == [10, 14, 19]
    assert block.next_offset == 20
    assert block.payload is None


def test_one_record_is_asked_for_and_only_its_block_is_parsed() -> None:
    batches = [record_batch([b"a"] * 3, base=0), record_batch([b"b"] * 3, base=3)]
    parts = list(blocks(b"".join(batches), 0))
    whole = LogBatch("t", 0, parts)
    assert whole.positions.tolist() == list(range(6))
    assert whole.values[4] == b"b"
    assert whole.values[-1] == b"b"
    assert parts[0]._columns is None
    assert parts[1]._columns is not None
    assert whole.values[1:4] == [b"a", b"a", b"b"]
    with pytest.raises(IndexError):
        whole.values[6]


def test_the_end_of_a_transaction_is_no_record() -> None:
    batch = bytearray(record_batch([b"a"]))
    batch[CONTROL_AT] |= CONTROL
    assert RecordBlock(bytes(batch)).control
    assert not RecordBlock(record_batch([b"a"])).control


def test_append_time_is_that_of_the_batch() -> None:
    batch = bytearray(record_batch([b"a", b"b"]))
    assert RecordBlock(bytes(batch)).appended_at_us.tolist() == [
        FIRST_MS * 1000,
        (FIRST_MS + 10) * 1000,
    ]
    batch[CONTROL_AT] |= 0x08
    assert (RecordBlock(bytes(batch)).appended_at_us == (FIRST_MS + 10) * 1000).all()


@given(st.integers(0, 7))
def test_a_flipped_bit_is_noticed(bit: int) -> None:
    batch = record_batch([b"abc" * 30, b"d"], codec=0)
    for at in np.linspace(21, len(batch) - 1, 15, dtype=int):
        broken = bytearray(batch)
        broken[at] ^= 1 << bit
        with pytest.raises(CorruptRecordException):
            list(blocks(bytes(broken), 0))


def test_old_batches_are_refused_by_name() -> None:
    batch = bytearray(record_batch([b"a"]))
    batch[16] = 1
    with pytest.raises(Fatal, match=r"before Kafka 0\.11"):
        list(blocks(bytes(batch), 0))
