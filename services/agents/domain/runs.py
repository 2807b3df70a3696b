"""The engine of durable runs: a run is its steps, and a workflow says which one comes next."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from causemesh.errors import Fatal

Origin = tuple[str, int, int]
"""Topic, partition and position of the record that started a run."""

_NAMESPACE = uuid.UUID("0b7d2c5e-54d3-5a0e-8f6b-3d6a4c1e9a72")


@dataclass(frozen=True)
class Signal:
    """Something that happened to a run: what, when (event time, microseconds), and its content."""

    name: str
    occurred_us: int
    content: Mapping[str, Any]


@dataclass(frozen=True)
class Step:
    """One step of a history. `result` is JSON: all that later steps may know about it."""

    number: int
    name: str
    occurred_us: int
    result: Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """A run: what it is about, and the steps it took, numbered from 0."""

    run_id: str
    workflow: str
    tenant_id: str
    request_id: str
    origin: Origin
    history: tuple[Step, ...] = ()

    @property
    def newest(self) -> Step:
        """The last step; a run has at least one from its start on."""
        return self.history[-1]


@dataclass(frozen=True)
class Move:
    """What a workflow answers to a signal: the name and the result of the next step."""

    name: str
    result: Mapping[str, Any]


class Refused(Exception):
    """The run's history does not admit the signal."""

    def __init__(self, run: Run, signal: Signal, reason: str) -> None:
        super().__init__(reason)
        self.run = run
        self.signal = signal


class Workflow(Protocol):
    """The rules of one kind of run."""

    @property
    def name(self) -> str:
        """The name that runs and their events carry."""

    def next_move(self, run: Run, signal: Signal) -> Move | None:
        """The next step, from the history and the signal alone.

        None when the history has answered the same signal before. Raises Refused.
        """


def advance(workflow: Workflow, run: Run, signal: Signal) -> Run:
    """The run with its next step; the very same run when the signal was answered before.

    Raises Refused when the history does not admit the signal, Fatal when it has gaps.
    """
    if [step.number for step in run.history] != list(range(len(run.history))):
        numbers = [step.number for step in run.history]
        raise Fatal(f"run {run.run_id} has steps {numbers}; restore its history, it must not skip")
    move = workflow.next_move(run, signal)
    if move is None:
        return run
    step = Step(len(run.history), move.name, signal.occurred_us, move.result)
    return replace(run, history=(*run.history, step))


def stable_id(kind: str, *names: str) -> str:
    """The UUIDv5 of a thing and what it is about: the same names give the same id anywhere."""
    # JSON keeps ("a", "b|c") and ("a|b", "c") apart whatever the names hold.
    return str(uuid.uuid5(_NAMESPACE, json.dumps([kind, *names])))


def result_json(result: Mapping[str, Any]) -> str:
    """A step's result as it is stored and sent: one text for one value."""
    return json.dumps(result, sort_keys=True, separators=(",", ":"))


def started(
    workflow: Workflow, tenant_id: str, request_id: str, origin: Origin, signal: Signal
) -> Run:
    """The run that `signal` about a request starts, with its first step."""
    run_id = stable_id("run", workflow.name, tenant_id, request_id)
    return advance(workflow, Run(run_id, workflow.name, tenant_id, request_id, origin), signal)
