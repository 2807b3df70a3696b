"""What counts as new work after a kill."""

from __future__ import annotations

from examples.flights.recovering import Stand, moved

KEY = ("g", 0)
BEFORE = {KEY: Stand(3, {("t", 0): 10, ("u", 0): 5})}


def test_a_position_beyond_counts() -> None:
    now = {KEY: Stand(3, {("t", 0): 10, ("u", 0): 6})}
    assert moved(BEFORE, now, reclaimed=False) == {KEY}


def test_the_last_commit_of_a_dying_process_does_not_count() -> None:
    """It may land after the kill, but under the claim the process had."""
    late = {KEY: Stand(3, {("t", 0): 11, ("u", 0): 5})}
    assert moved(BEFORE, late, reclaimed=True) == set()
    assert moved(BEFORE, {KEY: Stand(4, late[KEY].positions)}, reclaimed=True) == {KEY}


def test_a_claim_or_an_old_position_is_no_work() -> None:
    assert moved(BEFORE, {KEY: Stand(4, BEFORE[KEY].positions)}, reclaimed=True) == set()
    behind = {KEY: Stand(4, {("t", 0): 9, ("u", 0): 5})}
    assert moved(BEFORE, behind, reclaimed=True) == set()


def test_a_partition_that_had_nothing_committed_counts_from_its_first() -> None:
    assert moved({}, {KEY: Stand(1, {("t", 0): 0})}, reclaimed=True) == {KEY}
    assert moved({}, {KEY: Stand(1, {})}, reclaimed=True) == set()
