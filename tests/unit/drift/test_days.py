"""When a day ends, and when it is due."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from services.drift.domain.days import (
    DAY_US,
    day_end_us,
    earlier,
    labels_until_us,
    last_due_day,
)


def us(text: str) -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()) * 1_000_000


def test_a_day_ends_where_the_next_begins() -> None:
    assert day_end_us("2013-02-28") == us("2013-03-01T00:00:00")
    assert day_end_us("1969-12-31") == 0


@pytest.mark.parametrize("wait_hours", [0, 1, 24, 49])
def test_a_day_is_due_at_the_very_instant_its_labels_end(wait_hours: int) -> None:
    until_us = labels_until_us("2013-03-01", wait_hours)
    assert last_due_day(until_us, wait_hours) == "2013-03-01"
    assert last_due_day(until_us - 1, wait_hours) == "2013-02-28"


def test_promises_beyond_the_calendar_are_bounded() -> None:
    assert last_due_day(2**62, 24) == "9999-12-31"
    assert last_due_day(-(2**62), 24) == "0001-01-01"


def test_earlier_days() -> None:
    assert earlier("2013-03-01", 1) == "2013-02-28"
    assert day_end_us(earlier("2013-03-31", 30)) == day_end_us("2013-03-31") - 30 * DAY_US
    assert earlier("0001-01-02", 30) == "0001-01-01"
