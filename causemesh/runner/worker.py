"""One partition's worker: claim, seek, fetch, drop replays, handle, emit in order, commit fenced.

A unit of work is what one fetch brought. Its order is fixed and each step may be the last before a
crash:

1. decode, hear watermarks, drop replays (`Intake`);
2. the processor handles all batches of the unit, inside the store's transaction;
3. outputs are emitted in cause order and acknowledged, then watermarks behind them;
4. positions, marks, promises and state are committed with the effects, if the epoch is still ours.
   A state in files was taken some units earlier, and what was taken with it is committed.

A crash after 3 and before 4 emits the same outputs again; their readers' marks drop them. A failed
send stops the worker: it starts over from the stored position and never skips.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from causemesh.bus.base import BEFORE_FIRST, Bus, RawBatch, Reader, TopicPartition
from causemesh.catalogue import Catalogue
from causemesh.checkpoints import CheckpointSettings, Save, StateKeeper
from causemesh.clock import Clock
from causemesh.codec.base import BatchDecoder
from causemesh.faultpoints import Point, reach
from causemesh.positions import Checkpoint, Claim, PositionStore, Unit
from causemesh.runner.batch import NEVER, Batch, Emission, Outgoing, Processor
from causemesh.runner.deadletters import DeadRows, dead_letters, raw_rows
from causemesh.runner.emitter import Emitter
from causemesh.runner.faults import Faults
from causemesh.runner.intake import Intake
from causemesh.runner.marks import HighWaterMarks
from causemesh.runner.observer import Observer, UnitReport, Unobserved
from causemesh.runner.stage import Limits, Stage
from causemesh.runner.watermarks import WatermarkTracker
from causemesh.spans import UnitSpans

_LOOK_S = 0.5


class PartitionWorker:
    """Runs one partition of one stage until it is stopped, fenced or fails."""

    def __init__(
        self,
        stage: Stage,
        partition: int,
        processor: Processor,
        *,
        bus: Bus,
        store: PositionStore,
        catalogue: Catalogue,
        decoder: BatchDecoder,
        emitter: Emitter,
        clock: Clock,
        limits: Limits,
        observer: Observer | None = None,
        deduplicate: bool = True,
        spans: UnitSpans | None = None,
        checkpoints: CheckpointSettings | None = None,
    ) -> None:
        self.stage = stage
        self.partition = partition
        self.processor = processor
        self._bus = bus
        self._store = store
        self._catalogue = catalogue
        self._emitter = emitter
        self._limits = limits
        self._clock = clock
        self._observer: Observer = observer or Unobserved()
        self._spans = spans or UnitSpans(None, "", stage.group, hold=processor.stateful)
        self._faults = Faults(clock, limits, lambda: self.stopping)
        self._keeper = StateKeeper(processor, checkpoints, clock.monotonic)
        self._saving: tuple[Checkpoint, Save] | None = None
        self._marks = HighWaterMarks(enabled=deduplicate)
        inputs = stage.inputs(catalogue, partition)
        self.watermarks = WatermarkTracker(
            {source: stage.sources(catalogue, source) for source in inputs}
        )
        self.positions: dict[TopicPartition, int] = dict.fromkeys(inputs, BEFORE_FIRST)
        self.intake = Intake(catalogue, decoder, self._marks, self.watermarks)
        self._promised: dict[tuple[str, str, int], int] = {}
        self._uncommitted = 0
        self._asked = False  # for a commit, by the processor
        self._committed_at = clock.monotonic()
        self._dead = 0  # of the last unit
        self._sent: Mapping[str, int] = {}  # of the last unit, by topic
        self._seen_watermark = NEVER
        self.stopping = False
        self.committed = False
        """Whether this worker got anything done, so that its failure is a new one."""

    async def run(self) -> None:
        """Work until `stopping`. Raises Fenced when replaced, Retryable or Fatal when it failed."""
        claim, checkpoint = await self._store.claim(self.stage.group, self.partition)
        reach(Point.WORKER_CLAIMED)
        reader: Reader | None = None
        try:
            await self._restore(checkpoint or Checkpoint(), claim)
            reader = self._bus.reader(self.positions)
            while not self.stopping:
                pause_s = self._limits.pause_s(await self._step(claim, reader))
                await rest(self, self._clock, pause_s, _LOOK_S)
            while self._saving is not None or self._uncommitted:
                async with self._store.unit(claim) as unit:
                    await self._commit(unit, await self._taken())
        finally:
            if reader is not None:
                await reader.close()
            await self._keeper.close()

    async def _restore(self, stored: Checkpoint, claim: Claim) -> None:
        known = {source: at for source, at in stored.positions.items() if source in self.positions}
        self.positions.update(known)
        self._marks.load(stored.marks)
        self.watermarks.load(stored.promises)
        await self._keeper.restore(stored.state, claim.group, claim.partition, claim.epoch)

    async def _step(self, claim: Claim, reader: Reader) -> int:
        """One unit; returns how many records the fullest partition gave, and as many as fit where
        the log holds more."""
        raws = await reader.fetch(self._limits.max_records, self._limits.max_wait_s)
        if raws:  # an idle round is no step
            reach(Point.WORKER_FETCHED)
        began = self._clock.monotonic()
        replays = self.intake.counts.replays
        batches = await self.intake.take(raws)
        for raw in raws:
            self.positions[(raw.topic, raw.partition)] = int(raw.positions[-1])
        self._uncommitted += bool(raws)

        async def attempt(batches: Sequence[Batch], dead: DeadRows) -> None:
            await self._unit(claim, batches, dead, idle=not raws)

        async def rehearse(batches: Sequence[Batch]) -> None:
            async with self._store.unit(claim) as unit:
                await self.processor.process(batches, self.watermarks.least(), unit.transaction)

        with self._spans.unit(batches):
            await self._faults.contain(self.processor, batches, attempt, rehearse)
        if raws:
            report = UnitReport(
                sum(len(raw) for raw in raws),
                self.intake.counts.replays - replays,
                self._dead,
                sum(self._sent.values()),
                self._clock.monotonic() - began,
                self.watermarks.least(),
                _by_topic(raws),
                self._sent,
                self._spans.exemplar,
            )
            self._observer.unit_done(self.stage, self.partition, report)
        if any(raw.more for raw in raws):
            return self._limits.max_records
        return max(map(len, raws), default=0)

    async def _unit(
        self, claim: Claim, batches: Sequence[Batch], dead: DeadRows, *, idle: bool
    ) -> None:
        async with self._store.unit(claim) as unit:
            watermark = self.watermarks.least()
            emission = await self.processor.process(batches, watermark, unit.transaction)
            if batches:
                reach(Point.WORKER_PROCESSED)
            refused = [(batch, raw_rows(batch, rows)) for batch, rows in emission.refused]
            letters = dead_letters(self.stage.service, [*dead, *refused])
            promises = self._due_promises(emission)
            self._dead = sum(len(part) for part in letters)
            self._sent = _by_topic(emission.outgoing)
            await self._emitter.send([*emission.outgoing, *letters], promises, self._spans.traces)
            self._spans.emitted(emission.outgoing)
            if batches:
                reach(Point.WORKER_SENT)
            self._promised.update(promises)
            self._asked |= emission.commit
            moved = watermark != self._seen_watermark
            due = self._asked or self._commit_is_due(moved=moved, idle=idle)
            if self._saving is not None or due:
                taken = await self._taken()
                if idle or taken[1].done():
                    await self._commit(unit, taken)

    async def _taken(self) -> tuple[Checkpoint, Save]:
        """The checkpoint that waits to be committed, else one of now."""
        if self._saving is None:
            checkpoint = self._checkpoint()
            self._saving = checkpoint, await self._keeper.save()
            self._uncommitted = 0
            self._asked = False
            self._committed_at = self._clock.monotonic()
            self._seen_watermark = self.watermarks.least()
        return self._saving

    async def _commit(self, unit: Unit, taken: tuple[Checkpoint, Save]) -> None:
        checkpoint, save = taken
        state = await save.written()
        reach(Point.WORKER_COMMITTING)
        await unit.commit(replace(checkpoint, state=state))
        reach(Point.WORKER_COMMITTED)
        self._saving = None
        self._keeper.committed()
        self.committed = True

    def _commit_is_due(self, *, moved: bool, idle: bool) -> bool:
        waited = self._clock.monotonic() - self._committed_at >= self._limits.commit_every_s
        enough = self._uncommitted >= self._limits.commit_every_units
        if idle or not self.processor.stateful:
            return (idle or waited) and (self._uncommitted > 0 or moved)
        return enough and waited and not self._keeper.rests

    def _due_promises(self, emission: Emission) -> dict[tuple[str, str, int], int]:
        """Watermarks to forward: those that moved since the last unit, one an output topic."""
        due = {}
        for topic in self.stage.writes:
            for source in self._catalogue.topic(topic).sources:
                if source not in self.stage.shared:
                    continue
                read = self.watermarks.of_input((source, self.partition))
                at_us = emission.promises.get(source, NEVER if read is None else read)
                key = (topic, source, self.partition)
                if at_us > self._promised.get(key, NEVER):
                    due[key] = at_us
        return due

    def _checkpoint(self) -> Checkpoint:
        """As of now, less the state."""
        least = self.watermarks.least()
        return Checkpoint(
            dict(self.positions),
            self._marks.dump(),
            self.watermarks.dump(),
            None if least == NEVER else least,
        )


async def rest(worker: PartitionWorker, clock: Clock, seconds: float, look_s: float) -> None:
    """Wait, but not once the partition is given up: its next owner waits for that."""
    while seconds > 0 and not worker.stopping:
        await clock.sleep(min(seconds, look_s))
        seconds -= look_s


def _by_topic(parts: Sequence[RawBatch] | Sequence[Outgoing]) -> Mapping[str, int]:
    counts: dict[str, int] = {}
    for part in parts:
        counts[part.topic] = counts.get(part.topic, 0) + len(part)
    return counts
