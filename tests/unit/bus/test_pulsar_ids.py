"""Pulsar's message ids as positions."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from causemesh.bus.pulsar_ids import packed, packed_one, unpacked
from causemesh.errors import Fatal


@dataclass(frozen=True)
class Id:
    ledger: int
    entry: int
    batch: int

    def ledger_id(self) -> int:
        return self.ledger

    def entry_id(self) -> int:
        return self.entry

    def batch_index(self) -> int:
        return self.batch


LARGEST = ((1 << 31) - 1, (1 << 20) - 1, (1 << 12) - 1)


def test_positions_order_as_ids_do_and_give_them_back() -> None:
    ids = [(0, 0, 0), (0, 0, 4095), (0, 1, 0), (0, 1 << 19, 7), (3, 0, 1), LARGEST]
    positions = packed([Id(*one) for one in ids]).tolist()
    assert positions == sorted(set(positions)) == [packed_one(*one) for one in ids]
    assert [unpacked(at) for at in positions] == ids
    assert positions[-1] == (1 << 63) - 1


def test_a_record_alone_in_its_entry_has_index_nought() -> None:
    assert packed([Id(5, 6, -1)]).tolist() == [packed_one(5, 6, 0)]


@pytest.mark.parametrize("part", [0, 1, 2])
def test_numbers_that_do_not_fit_are_refused(part: int) -> None:
    numbers = list(LARGEST)
    numbers[part] += 1
    with pytest.raises(Fatal, match="don't fit"):
        packed([Id(0, 0, 0), Id(*numbers)])
