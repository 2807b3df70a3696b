"""The table of keys against a dictionary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.features.domain import key_table
from services.features.domain.entities import EntityIndex
from services.features.domain.key_table import KeyTable

_NAMES = [f"k{n}" for n in range(400)]
# What is put and forgotten, some keys at a time; row 0 forgets.
_STEPS = st.lists(
    st.dictionaries(st.sampled_from(_NAMES), st.integers(0, 2**31 - 1), min_size=1), max_size=12
)
Hashed = Callable[[pl.Series], tuple[Any, Any]]


def agrees(steps: list[dict[str, int]]) -> None:
    """After each step every key has the row of the dictionary."""
    table, known = KeyTable(), dict[str, int]()
    for step in steps:
        known |= step
        keys = pl.Series(list(step), dtype=pl.String)
        table.put(keys, np.array(list(step.values()), dtype=np.int64))
        found = table.find(pl.Series(_NAMES))
        assert found.tolist() == [known.get(name, 0) for name in _NAMES]


def crowded(keys: pl.Series) -> tuple[Any, Any]:
    """Hashes of which many are equal, in slots that are neighbours; the checks differ."""
    numbers = keys.str.slice(1).cast(pl.UInt64).to_numpy()
    return 1_020 + numbers % 7, numbers.astype(np.uint32)


@given(_STEPS)
@settings(deadline=None)
def test_a_table_answers_as_a_dictionary(steps: list[dict[str, int]]) -> None:
    agrees(steps)


@given(_STEPS)
@settings(max_examples=30, deadline=None)
def test_keys_in_each_others_slots_are_told_apart(steps: list[dict[str, int]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(key_table, "_hashed", crowded)
        agrees(steps)


def test_control_without_the_check_equal_hashes_are_one_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unchecked(keys: pl.Series) -> tuple[Any, Any]:
        hashes, checks = crowded(keys)
        return hashes, np.zeros_like(checks)

    monkeypatch.setattr(key_table, "_hashed", unchecked)
    with pytest.raises(AssertionError):
        agrees([{"k1": 5, "k8": 6}])


def test_a_table_grows_with_its_keys_and_not_with_those_that_it_forgot() -> None:
    table = KeyTable()
    for start in range(0, 50_000, 500):
        keys = pl.Series([f"k{n}" for n in range(start, start + 500)])
        table.put(keys, np.arange(start + 1, start + 501))
        table.put(keys[:400], np.zeros(400, np.int64))
    held = 100 * 100
    assert table.nbytes <= key_table.SLOT_BYTES * 2**16
    every = pl.Series([f"k{n}" for n in range(50_000)])
    assert np.count_nonzero(table.find(every)) == held


@pytest.mark.parametrize("count", [10, 2_000])
def test_nulls_and_strangers_are_nobody_however_many_are_asked(count: int) -> None:
    index = EntityIndex()
    keys = pl.Series([f"k{n}" for n in range(3_000)])
    rows = index.find_or_add(keys)
    assert rows.tolist() == list(range(1, 3_001))
    asked = pl.Series([None, "stranger", *keys[: count - 2].to_list()])
    assert index.find(asked).tolist() == [0, 0, *range(1, count - 1)]
    index.release(np.arange(1, 1_001))
    again = pl.Series([f"k{n}" for n in range(500, 1_500)])
    expected = [*range(1, 501), *range(1_001, 1_501)]  # the lowest free rows, then their own
    assert index.find_or_add(again).tolist() == expected
