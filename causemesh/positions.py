"""Positions live with the effect: the store that claims, fences and commits.

A claim raises the partition's epoch; a commit carries the claim and fails with `Fenced` when the
epoch has moved on. So a worker that was paused and replaced writes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from causemesh.bus.base import TopicPartition
from causemesh.errors import Fenced


@dataclass(frozen=True)
class Claim:
    """The right to commit for one partition of one group, as long as nobody claims it later."""

    group: str
    partition: int
    epoch: int


@dataclass(frozen=True)
class Checkpoint:
    """How far a partition is: positions, marks, promises and the processor's own state."""

    positions: dict[TopicPartition, int] = field(default_factory=dict)
    marks: list[list[Any]] = field(default_factory=list)
    promises: list[list[Any]] = field(default_factory=list)
    watermark_us: int | None = None
    state: bytes | None = None

    def progress(self) -> str:
        """Everything but the state, as JSON."""
        return json.dumps(
            {
                "positions": [[*source, position] for source, position in self.positions.items()],
                "marks": self.marks,
                "promises": self.promises,
            },
            separators=(",", ":"),
        )

    @classmethod
    def parse(cls, progress: str, watermark_us: int | None, state: bytes | None) -> Checkpoint:
        """The inverse of `progress`."""
        read = json.loads(progress)
        positions = {(topic, partition): at for topic, partition, at in read["positions"]}
        return cls(positions, read["marks"], read["promises"], watermark_us, state)


class Unit(Protocol):
    """One unit of work in progress."""

    transaction: Any

    async def commit(self, checkpoint: Checkpoint) -> None:
        """Store the checkpoint with the unit's effects. Raises Fenced."""


class PositionStore(Protocol):
    """Where checkpoints live."""

    async def claim(self, group: str, partition: int) -> tuple[Claim, Checkpoint | None]:
        """Take the partition over and read its last committed checkpoint."""

    def unit(self, claim: Claim) -> AbstractAsyncContextManager[Unit]:
        """Open a unit; leaving it without a commit undoes its effects."""


@dataclass
class _Row:
    epoch: int = 0
    checkpoint: Checkpoint | None = None
    effects: list[Any] = field(default_factory=list)


class MemoryPositionStore:
    """A store for tests: `transaction` is a list, appended to `effects` on commit."""

    def __init__(self, step: Callable[[str], Awaitable[None]], *, fenced: bool = True) -> None:
        self._step = step
        self._fenced = fenced  # off only in the control arm of the simulation
        self.rows: dict[tuple[str, int], _Row] = {}

    async def claim(self, group: str, partition: int) -> tuple[Claim, Checkpoint | None]:
        """See `PositionStore.claim`."""
        await self._step("claim")
        row = self.rows.setdefault((group, partition), _Row())
        row.epoch += 1
        return Claim(group, partition, row.epoch), row.checkpoint

    def unit(self, claim: Claim) -> AbstractAsyncContextManager[Unit]:
        """See `PositionStore.unit`."""
        return _MemoryUnit(self, claim)

    async def write(self, claim: Claim, checkpoint: Checkpoint, effects: list[Any]) -> None:
        """One atomic write. Raises Fenced."""
        await self._step("commit")
        row = self.rows[(claim.group, claim.partition)]
        if self._fenced and row.epoch != claim.epoch:
            raise Fenced(f"{claim.group}[{claim.partition}] was claimed by epoch {row.epoch}")
        row.checkpoint = checkpoint
        row.effects.extend(effects)


class _MemoryUnit:
    def __init__(self, store: MemoryPositionStore, claim: Claim) -> None:
        self.transaction: list[Any] = []
        self._store = store
        self._claim = claim

    async def __aenter__(self) -> _MemoryUnit:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.transaction = []

    async def commit(self, checkpoint: Checkpoint) -> None:
        await self._store.write(self._claim, checkpoint, self.transaction)
