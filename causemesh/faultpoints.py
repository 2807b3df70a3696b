"""Named places at which a test may end, pause or fail a process; off unless a setting names one.

A point lies between two steps of the protocol, where a crash could lose or double something. The
list is declared once, here; `CAUSEMESH_FAULT=worker.sent:kill:3` ends the process by SIGKILL the
third time it gets there. When nothing is armed a point costs one comparison.
"""

from __future__ import annotations

import os
import signal
from enum import StrEnum

from causemesh.errors import Misdeclared, Retryable


class Point(StrEnum):
    """Every place, in the order in which a record passes them."""

    WORKER_CLAIMED = "worker.claimed"
    WORKER_FETCHED = "worker.fetched"
    INGEST_CLAIMING = "ingest.claiming"
    INGEST_CLAIMED = "ingest.claimed"
    INFERENCE_ASKING = "inference.asking"
    INFERENCE_ANSWERED = "inference.answered"
    WORKER_PROCESSED = "worker.processed"
    WORKER_SENT = "worker.sent"
    WORKER_COMMITTING = "worker.committing"
    WORKER_COMMITTED = "worker.committed"
    OUTBOX_READ = "outbox.read"
    OUTBOX_SENT = "outbox.sent"
    OUTBOX_MARKED = "outbox.marked"
    BILLING_MAKING = "billing.making"
    BILLING_MADE = "billing.made"
    BILLING_FINALISING = "billing.finalising"
    BILLING_FINALISED = "billing.finalised"
    BILLING_NOTED = "billing.noted"
    TRANSFORM_APPLIED = "transform.applied"
    TRANSFORM_SENT = "transform.sent"
    TRANSFORM_STORED = "transform.stored"
    LAKE_CLAIMED = "lake.claimed"
    LAKE_WRITING = "lake.writing"
    LAKE_WRITTEN = "lake.written"
    LAKE_COMMITTED = "lake.committed"
    LAKE_COMPACTED = "lake.compacted"
    LAKE_SWEEPING = "lake.sweeping"
    BACKFILL_PLACED = "backfill.placed"
    BACKFILL_READ = "backfill.read"
    BACKFILL_COMPUTED = "backfill.computed"
    BACKFILL_MERGED = "backfill.merged"


class Action(StrEnum):
    """What happens there."""

    KILL = "kill"
    PAUSE = "pause"  # until somebody sends SIGCONT
    ERROR = "error"  # raises Retryable


class _Fault:
    def __init__(self, point: Point, action: Action, count: int) -> None:
        self._point = point
        self._action = action
        self._left = count

    def reach(self, point: Point) -> None:
        if point is not self._point:
            return
        self._left -= 1
        if self._left:
            return
        if self._action is Action.KILL:
            os.kill(os.getpid(), signal.SIGKILL)
        elif self._action is Action.PAUSE:
            os.kill(os.getpid(), signal.SIGSTOP)
        else:
            raise Retryable(f"fault at {point}", retry_after=0.1)


class _Armed:
    fault: _Fault | None = None


def arm(setting: str) -> None:
    """Arm `point:action[:count]`, once; the empty setting disarms. Raises Misdeclared."""
    if not setting:
        _Armed.fault = None
        return
    name, _, rest = setting.partition(":")
    action, _, count = rest.partition(":")
    problem = f"CAUSEMESH_FAULT={setting}"
    if name not in set(Point):
        raise Misdeclared(f"{problem}: {name} is none of the points {', '.join(Point)}")
    if action not in set(Action):
        raise Misdeclared(f"{problem}: {action or 'nothing'} is none of {', '.join(Action)}")
    if count and not (count.isdecimal() and int(count) > 0):
        raise Misdeclared(f"{problem}: the count must be a whole number from 1")
    _Armed.fault = _Fault(Point(name), Action(action), int(count or 1))


def reach(point: Point) -> None:
    """Say that the process got to `point`. Raises Retryable where that is armed."""
    fault = _Armed.fault
    if fault is not None:
        fault.reach(point)
