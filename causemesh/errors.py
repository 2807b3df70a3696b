"""The three kinds of failure a mesh service knows.

Anything else that a handler raises is unknown: the runner retries it a bounded number of times,
then isolates the rows that raise and dead-letters them with their reason and cause.
"""

from __future__ import annotations

from collections.abc import Mapping


class MeshError(Exception):
    """Base of the errors the kit raises on purpose."""


class Retryable(MeshError):
    """The same work may succeed later (a dependency is away).

    `retry_after` is in seconds; the runner waits at least that long before it tries again.
    """

    def __init__(self, message: str, *, retry_after: float = 0.5) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Poison(MeshError):
    """Some rows of the batch can never be handled; the others can.

    `rows` maps a frame row of the unit's batch number `batch` to the reason a person will read on
    the dead letter.
    """

    def __init__(self, rows: Mapping[int, str], *, batch: int = 0) -> None:
        super().__init__(f"{len(rows)} poison rows: {dict(list(rows.items())[:3])}")
        self.rows = dict(rows)
        self.batch = batch


class Fatal(MeshError):
    """Going on would break a promise: stop without committing."""


class Gone(Fatal):
    """The log no longer holds what was asked for."""


class Fenced(Fatal):
    """Another worker claimed this partition; nothing of ours may be written any more."""


class Misdeclared(Fatal):
    """Code or configuration disagrees with the catalogue; the message says what to change."""
