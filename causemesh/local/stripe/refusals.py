"""Stripe's error object, as an exception and as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Refused(Exception):
    """A call answered with an error.

    `code` and `param` are Stripe's; None leaves them out, as Stripe does. `headers` go with it.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        code: str | None = None,
        param: str | None = None,
        kind: str = "invalid_request_error",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        fields = {"type": kind, "code": code, "message": message, "param": param}
        self.body: dict[str, Any] = {
            "error": {name: value for name, value in fields.items() if value is not None}
        }


def no_such(kind: str, wanted: str, *, param: str, status: int = 400) -> Refused:
    """An id that names nothing: 404 when it came in the path, 400 when in a parameter."""
    return Refused(
        f"No such {kind}: '{wanted}'", status=status, code="resource_missing", param=param
    )


def not_editable(message: str) -> Refused:
    """The invoice is past the state in which it could change."""
    return Refused(message, code="invoice_not_editable")
