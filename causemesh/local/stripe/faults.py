"""Faults on demand, for tests: what Stripe does on its bad days."""

from __future__ import annotations

from collections import Counter
from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from causemesh.local.stripe.operations import Operation
from causemesh.local.stripe.refusals import Refused


class Fault(BaseModel):
    """The next `count` calls go wrong.

    `500`: answered and kept under the key before (`when`) the effect, or after it.
    `429`: refused with Retry-After, not kept under the key.
    `timeout_after_commit`: the effect is done and kept, the connection is dropped without answer.
    `timeout_while_running`: the connection is dropped at once; the effect is done and kept after
    `delay_ms`, and until then another call under the key is refused (409).
    `slow`: done after `delay_ms`, in which the key is in use.
    `method` and `path` (as declared, such as `/v1/invoices/{id}/finalize`) narrow which calls.
    """

    model_config = ConfigDict(extra="forbid")

    next: Literal[500, 429, "timeout_after_commit", "timeout_while_running", "slow"]
    count: int = Field(default=1, ge=1)
    when: Literal["before", "after"] = "before"
    delay_ms: int = Field(default=500, ge=0)
    method: str | None = None
    path: str | None = None

    def hits(self, operation: Operation) -> bool:
        """Whether a call of that endpoint goes wrong."""
        return self.method in (None, operation.method) and self.path in (None, operation.path)


class Report(BaseModel):
    """How many ordered faults still wait, and how calls ended: `dropped`, or by status, those
    from a kept answer apart (`500 replayed`)."""

    waiting: int
    answers: dict[str, int]


class Faults:
    """The faults that wait, first come first served, how often each endpoint was called, and how
    calls were answered."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.answers: Counter[str] = Counter()
        self._waiting: list[Fault] = []

    def add(self, fault: Fault) -> None:
        """Let the next calls go wrong."""
        self._waiting.append(fault)

    def take(self, operation: Operation) -> Fault | None:
        """Count a call and use up one fault that hits it."""
        self.calls[f"{operation.method} {operation.path}"] += 1
        fault = next((waiting for waiting in self._waiting if waiting.hits(operation)), None)
        if fault is not None:
            fault.count -= 1
            if not fault.count:
                self._waiting.remove(fault)
        return fault

    def routes(self) -> APIRouter:
        """`POST /_faults`, `GET /_faults` and `GET /_calls`."""
        router = APIRouter()

        @router.post("/_faults")
        async def add(fault: Fault) -> Fault:
            answer = fault.model_copy()
            self.add(fault)
            return answer

        @router.get("/_faults")
        async def report() -> Report:
            waiting = sum(fault.count for fault in self._waiting)
            return Report(waiting=waiting, answers=dict(self.answers))

        @router.get("/_calls")
        async def calls() -> dict[str, int]:
            return dict(self.calls)

        return router


def rate_limited() -> Refused:
    """Too many requests."""
    return Refused(
        "Too many requests in a period of time. Try again later.",
        status=429,
        code="rate_limit",
        headers={"Retry-After": "1"},
    )


def broken() -> Refused:
    """Something went wrong on Stripe's side."""
    return Refused("An unknown error occurred", status=500, kind="api_error")
