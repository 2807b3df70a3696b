"""How often Python's cycle collector runs while a unit of work comes in."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from causemesh.collector import collect_seldom

RECORDS = 20_000


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    before = gc.get_threshold()
    yield
    gc.set_threshold(*before)
    gc.unfreeze()


def collections_while_reading() -> int:
    """Collections while a unit of records, each with a list of its own, is made and kept."""
    before = sum(one["collections"] for one in gc.get_stats())
    unit = [(number, [number]) for number in range(RECORDS)]
    assert len(unit) == RECORDS
    return sum(one["collections"] for one in gc.get_stats()) - before


@pytest.mark.parametrize("seldom", [True, False])
def test_the_collector_leaves_a_unit_of_records_alone(*, seldom: bool) -> None:
    """The control arm: with Python's own setting it looks at them more than twenty times."""
    if seldom:
        collect_seldom()
    assert (collections_while_reading() <= 1) == seldom


def test_garbage_in_cycles_is_still_collected() -> None:
    collect_seldom()

    class Node:
        def __init__(self) -> None:
            self.itself = self

    before = sum(one["collected"] for one in gc.get_stats())
    for _ in range(150_000):
        Node()
    assert sum(one["collected"] for one in gc.get_stats()) > before
