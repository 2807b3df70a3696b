"""Billing months: UTC calendar months, written `2013-01`, in microseconds since the epoch."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


def month_of(us: int) -> str:
    """The month of an instant (microseconds). OverflowError outside the years 1 to 9999."""
    instant = _EPOCH + timedelta(microseconds=us)
    return f"{instant.year:04}-{instant.month:02}"


def month_bounds(month: str) -> tuple[int, int]:
    """First instant of the month and of the next one, microseconds; ValueError if it is none."""
    start = datetime.strptime(month, "%Y-%m").replace(tzinfo=UTC)
    if start.strftime("%Y-%m").zfill(7) != month:
        raise ValueError(f"{month!r} is no month; write YYYY-MM")
    following = (start + timedelta(days=31)).replace(day=1)
    return (start - _EPOCH) // _MICROSECOND, (following - _EPOCH) // _MICROSECOND


def closable_months(watermark_us: int, grace_us: int, open_months: Iterable[str]) -> list[str]:
    """The open months that ended `grace_us` or more before the watermark, oldest first."""
    return sorted(
        month for month in open_months if month_bounds(month)[1] + grace_us <= watermark_us
    )
