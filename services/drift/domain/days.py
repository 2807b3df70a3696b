"""Event-time days: when they end, and when they can be judged. Instants are microseconds, UTC."""

from __future__ import annotations

from datetime import date

DAY_US = 86_400_000_000
_HOUR_US = 3_600_000_000
_EPOCH = date(1970, 1, 1)


def day_end_us(day: str) -> int:
    """The first instant after `day` (YYYY-MM-DD)."""
    return ((date.fromisoformat(day) - _EPOCH).days + 1) * DAY_US


def labels_until_us(day: str, label_wait_hours: int) -> int:
    """The instant up to which a label counts for a prediction of `day`; then the day is judged."""
    return day_end_us(day) + label_wait_hours * _HOUR_US


def last_due_day(watermark_us: int, label_wait_hours: int) -> str:
    """The last day whose predictions and labels are all in at a watermark.

    A promise beyond the calendar ("all is over") closes every day there is.
    """
    days = (watermark_us - label_wait_hours * _HOUR_US) // DAY_US - 1
    return _bounded(_EPOCH.toordinal() + days).isoformat()


def earlier(day: str, days: int) -> str:
    """The day so many days before `day`."""
    return _bounded(date.fromisoformat(day).toordinal() - days).isoformat()


def _bounded(ordinal: int) -> date:
    return date.fromordinal(min(max(ordinal, date.min.toordinal()), date.max.toordinal()))
