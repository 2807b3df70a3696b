"""What the benchmark of checkpoints works on: a partition's state, its events, who commits it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl

from benchmarks.feature_windows import view_of
from benchmarks.harness import Figures
from causemesh.checkpoints import CheckpointSettings, Encode, LocalFiles, Save, StateKeeper
from services.features.domain.definitions import FeatureView
from services.features.domain.events import Ints, read_events
from services.features.domain.state import PartitionState

UNIT = 20_000
COMMIT_UNITS = 20
"""At least so many units, and so many seconds, lie between two checkpoints: as the service's
settings are."""
COMMIT_S = 1.0
MINUTE_US = 60_000_000
HOUR_US = 60 * MINUTE_US
MIB = 2**20
INLINE = MIB


class Partition:
    """A partition's state as the runner sees it: `Pieced`, as the service's Join is."""

    def __init__(self, view: FeatureView) -> None:
        self.view = view
        self.state = PartitionState([view])
        self.whole = False

    def restore(self, state: bytes | None) -> None:
        """The state that is there stays when there is none to restore."""
        if state is not None:
            self.state.restore(state)

    def snapshot(self) -> bytes | None:
        """All of it, or something as large."""
        if self.whole:
            return self.state.snapshot()
        return bytes(INLINE + 1)  # only its size counts: a service goes to files while it is small

    def pieces(self) -> Sequence[str]:
        """See `Pieced`."""
        return self.state.pieces()

    def piece(self, name: str) -> Encode:
        """See `Pieced`."""
        return self.state.piece(name)

    def track(self) -> None:
        """See `Pieced`."""
        self.state.track()

    def replaced(self) -> bool:
        """See `Pieced`: nothing is put in another's place here."""
        return False

    def delta(self) -> Encode:
        """See `Pieced`."""
        return self.state.changes()

    def apply(self, body: bytes) -> None:
        """See `Pieced`."""
        self.state.apply_part(body)

    def applied(self) -> None:
        """See `Pieced`."""
        self.state.settle()

    def committed(self) -> None:
        """See `Pieced`; nobody asks."""

    def forget_changes(self) -> None:
        """As if nobody ever asked for changes."""
        for view in self.state.store.views.values():
            view.index.changed = view.ring.touched = view.touched = view.cleared = None
        self.state.aligner._unsaved = None


def plain_view() -> FeatureView:
    """Ten features over 13 tiles."""
    return view_of(["count", "sum", "mean", "min", "max"], ["6h", "24h"], "2h")


def frame_of(keys: Ints, at_us: Ints, rng: np.random.Generator) -> pl.DataFrame:
    """Events as the service decodes them."""
    count = len(keys)
    return pl.DataFrame(
        {
            "tenant_id": pl.repeat("t", count, eager=True),
            "k": pl.Series(keys).cast(pl.String),
            "occurred_at_us": at_us,
            "source": np.zeros(count, np.int32),
            "position": np.arange(count),
            "x": rng.normal(0, 3, count),
        }
    )


def fill(partition: Partition, entities: int) -> None:
    """Every entity with an event in each of its tiles."""
    view = partition.state.store.views[partition.view.id]
    for hour in range(0, 26, 2):
        for start in range(0, entities, UNIT):
            rng = np.random.default_rng(start + hour)
            keys = np.arange(start, min(entities, start + UNIT))
            frame = frame_of(keys, np.full(len(keys), hour * HOUR_US), rng)
            view.apply(read_events(partition.view, frame))
    partition.state.advance(24 * HOUR_US)


class Load:
    """Events of random entities, a second of event time to a unit.

    Events are made as they are needed: all of a run's would take as much memory as the state.
    `made_cpu_s` and `made_s` say what making them took, so that it counts for nothing.
    """

    def __init__(self, partition: Partition, entities: int, draw: str) -> None:
        self._partition = partition
        self._entities = entities
        self._zipf = draw == "zipf"
        self._rng = np.random.default_rng(7)
        self._now_us = 24 * HOUR_US
        self.made_cpu_s = self.made_s = 0.0

    def frame(self) -> pl.DataFrame:
        """The events of the next unit."""
        cpu, wall = time.thread_time(), time.monotonic()
        keys = self._rng.integers(0, self._entities, UNIT)
        if self._zipf:
            keys = np.minimum(self._rng.zipf(1.2, UNIT), self._entities) - 1
        at_us = self._now_us + self._rng.integers(0, 1_000_000, UNIT)
        self._now_us += 1_000_000
        made = frame_of(keys, at_us, self._rng)
        self.made_cpu_s += time.thread_time() - cpu
        self.made_s += time.monotonic() - wall
        return made

    def unit(self, frame: pl.DataFrame) -> None:
        """As a unit of the service: read, take, advance."""
        state = self._partition.state
        state.add_events("e", frame)
        state.advance(int(frame["occurred_at_us"].to_numpy()[-1]))


class Clock:
    """Time and processor time since it was made, less what making events took."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._began = self._now()

    def _now(self) -> tuple[float, float]:
        load = self._load
        return time.process_time() - load.made_cpu_s, time.monotonic() - load.made_s

    def rates(self, units: int) -> Figures:
        """Of so many units."""
        cpu_s, wall_s = (now - then for now, then in zip(self._now(), self._began, strict=True))
        events = units * UNIT
        rates = {"events_per_cpu_second": events / cpu_s, "events_per_second": events / wall_s}
        return {**rates, "cpu_seconds": cpu_s}


class Writer:
    """Commits as a worker does, the row being a variable."""

    def __init__(self, keeper: StateKeeper) -> None:
        self._keeper = keeper
        self._save: Save | None = None
        self._units = 0
        self._at = time.monotonic()
        self.state = b""
        self.commits = 0
        self.took_s = 0.0  # on a processor, to take the checkpoints and to write them

    async def after_unit(self) -> None:
        """Save when it is time, commit when the files are written."""
        self._units += 1
        waited = time.monotonic() - self._at >= COMMIT_S
        due = waited and self._units >= COMMIT_UNITS and not self._keeper.rests
        if self._save is None and due:
            await self._begin()
        await asyncio.sleep(0)
        if self._save is not None and self._save.done():
            await self.finish()

    async def finish(self) -> None:
        """Wait for the save that is under way."""
        if self._save is not None:
            self.state = await self._save.written() or b""
            assert not isinstance(self._save.work, asyncio.Task), "it is written"
            self.took_s += self._save.work.took_s
            self._keeper.committed()
            self._save = None
            self.commits += 1

    async def last(self) -> None:
        """A checkpoint of now."""
        await self.finish()
        await self._begin()
        await self.finish()

    async def _begin(self) -> None:
        self._save = await self._keeper.save()
        self._units, self._at = 0, time.monotonic()


class CountedFiles(LocalFiles):
    """Counts what is written, by kind."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.sizes: dict[str, list[int]] = {"piece": [], "delta": [], "deltas": []}

    def write(self, name: str, content: bytes) -> None:
        """See `CheckpointFiles`."""
        kind = name.rpartition("-")[2].rstrip("0123456789")
        self.sizes[kind].append(len(content))
        super().write(name, content)


async def opened(partition: Partition, files: LocalFiles, epoch: int, inline: int) -> StateKeeper:
    """A keeper of a state that is there already."""
    keeper = StateKeeper(partition, CheckpointSettings(files, inline))
    await keeper.restore(None, "bench", 0, epoch)
    return keeper
