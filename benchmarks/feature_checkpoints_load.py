"""What checkpoints of a large state cost, and how soon a restart has it back.

Two million entities of ten features (fewer with --entities): the first checkpoint, events a second
with and without checkpoints in turn, bytes written against bytes touched, and a restart in a
process of its own. With --sizes instead: small states, whole in the row against in files.

usage: python -m benchmarks.feature_checkpoints [--entities 2000000] [--rounds 3] [--draw uniform]
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl

from benchmarks.feature_windows import view_of
from causemesh.checkpoints import CheckpointSettings, Encode, LocalFiles, Save, StateKeeper
from causemesh.checkpoints.manifest import Manifest
from services.features.domain.definitions import FeatureView
from services.features.domain.events import Ints, read_events
from services.features.domain.memory import entity_bytes
from services.features.domain.state import PartitionState

UNIT = 20_000
COMMIT_UNITS = 20
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
    """Events of random entities, a second of event time to a unit."""

    def __init__(self, partition: Partition, entities: int, draw: str) -> None:
        self._partition = partition
        self._entities = entities
        self._zipf = draw == "zipf"
        self._rng = np.random.default_rng(7)
        self._now_us = 24 * HOUR_US
        self.frames: list[pl.DataFrame] = []

    def prepare(self, units: int) -> None:
        """Make the frames beforehand: making them is no part of the work."""
        self.frames = []
        for _ in range(units):
            keys = self._rng.integers(0, self._entities, UNIT)
            if self._zipf:
                keys = np.minimum(self._rng.zipf(1.2, UNIT), self._entities) - 1
            at_us = self._now_us + self._rng.integers(0, 1_000_000, UNIT)
            self._now_us += 1_000_000
            self.frames.append(frame_of(keys, at_us, self._rng))

    def unit(self, frame: pl.DataFrame) -> None:
        """As a unit of the service: read, take, advance."""
        state = self._partition.state
        state.add_events("e", frame)
        state.advance(int(frame["occurred_at_us"].to_numpy()[-1]))


class Writer:
    """Commits as a worker does, the row being a variable."""

    def __init__(self, keeper: StateKeeper) -> None:
        self._keeper = keeper
        self._save: Save | None = None
        self._units = 0
        self._at = time.monotonic()
        self.state = b""

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
            self._keeper.committed()
            self._save = None

    async def last(self) -> None:
        """A checkpoint of now."""
        await self.finish()
        await self._begin()
        await self.finish()

    async def _begin(self) -> None:
        self._save = await self._keeper.save()
        self._units, self._at = 0, time.monotonic()


async def throughput(partition: Partition, load: Load, writer: Writer, rounds: int) -> None:
    """Events a CPU second and a second, without checkpoints and with them, in turn."""
    units = 12 * COMMIT_UNITS
    rates: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    for number in range(2 * rounds):
        saving = bool(number % 2)
        load.prepare(units)
        if saving:
            partition.track()
        else:
            partition.forget_changes()
        cpu, wall = time.process_time(), time.monotonic()
        for frame in load.frames:
            load.unit(frame)
            if saving:
                await writer.after_unit()
        if saving:
            await writer.finish()
        events = units * UNIT
        rates[saving].append(
            (events / (time.process_time() - cpu), events / (time.monotonic() - wall))
        )
    for saving, found in rates.items():
        cpu_rates, wall_rates = zip(*found, strict=True)
        name = "with checkpoints" if saving else "without"
        told = " ".join(f"{rate:,.0f}" for rate in cpu_rates)
        print(
            f"{name}: {np.median(cpu_rates):,.0f} events a CPU second ({told}),"
            f" {np.median(wall_rates):,.0f} a second"
        )
    lost = 1 - np.median([r[0] for r in rates[True]]) / np.median([r[0] for r in rates[False]])
    print(f"checkpoints cost {lost:.1%} of the events a CPU second")


def rss_gib() -> float:
    """Of this process, now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**30


def peak_gib() -> float:
    """Of this process, ever."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


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


async def first(partition: Partition, files: CountedFiles, epoch: int) -> tuple[StateKeeper, bytes]:
    """All pieces, and what they cost."""
    keeper = await opened(partition, files, epoch, INLINE)
    before = len(files.sizes["piece"])
    cpu, wall = time.process_time(), time.monotonic()
    state = await (await keeper.save()).written() or b""
    keeper.committed()
    sizes = files.sizes["piece"][before:]
    print(
        f"all pieces: {sum(sizes) / MIB:,.0f} MiB in {len(sizes)} files, manifest"
        f" {len(state) / 1024:.0f} KiB, {time.monotonic() - wall:.1f} s,"
        f" {time.process_time() - cpu:.1f} s of CPU"
    )
    return keeper, state


async def measure(entities: int, rounds: int, draw: str, folder: Path) -> None:
    """A large state: throughput, bytes, memory, restart."""
    partition = Partition(plain_view())
    fill(partition, entities)
    memory = partition.state.memory_bytes()
    print(f"{entities:,} entities: {memory / 2**30:.2f} GiB of arrays, process {rss_gib():.2f} GiB")
    files = CountedFiles(folder)
    keeper, _ = await first(partition, files, 1)
    print(f"memory: {rss_gib():.2f} GiB, {peak_gib():.2f} GiB at the most")
    pieces = len(files.sizes["piece"])
    load = Load(partition, entities, draw)
    await throughput(partition, load, Writer(keeper), rounds)
    deltas, anew = files.sizes["delta"], files.sizes["piece"][pieces:]
    print(
        f"{len(deltas)} checkpoints: delta {np.mean(deltas) / MIB:.1f} MiB, pieces anew"
        f" {sum(anew) / len(deltas) / MIB:.1f} MiB, merged"
        f" {sum(files.sizes['deltas']) / len(deltas) / MIB:.1f} MiB each"
    )
    print(f"memory: {rss_gib():.2f} GiB, {peak_gib():.2f} GiB at the most")
    await keeper.close()
    keeper, state = await first(partition, files, 2)
    writer = Writer(keeper)
    load.prepare(4 * COMMIT_UNITS)
    touched: list[int] = []
    for number, frame in enumerate(load.frames):
        load.unit(frame)
        touched += frame["k"].to_list() if number < COMMIT_UNITS else []
        await writer.after_unit()
    await writer.last()
    await keeper.close()
    one = entity_bytes(partition.view)
    told = f"{len(set(touched)):,} of {len(touched):,} events' entities"
    print(
        f"touched in {COMMIT_UNITS} units: {told}, {len(set(touched)) * one / MIB:.0f} MiB of rows"
    )
    restart(folder, writer.state or state, partition, entities)


def restart(folder: Path, state: bytes, partition: Partition, entities: int) -> None:
    """Read it back in a process of its own, from files that are in no cache."""
    manifest = Manifest.parse(state)
    mib = (manifest.piece_bytes + manifest.delta_bytes) / MIB
    print(f"restart from {len(manifest.files)} files, {mib:,.0f} MiB", flush=True)
    for name in manifest.files:
        with (folder / name).open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    (folder / "manifest").write_bytes(state)
    argv = [sys.executable, "-m", "benchmarks.feature_checkpoints", "--restart", str(folder)]
    done = subprocess.run(argv, check=True, capture_output=True, text=True)
    *told, digest = done.stdout.strip().splitlines()
    print("\n".join(told))
    if digest != digest_of(partition):
        raise SystemExit("the restored state is not the one that was written")
    print("the restored state answers the same bits")


async def read_back(folder: Path) -> None:
    """The child of `restart`."""
    partition = Partition(plain_view())
    settings = CheckpointSettings(LocalFiles(folder), INLINE)
    keeper = StateKeeper(partition, settings)
    state = (folder / "manifest").read_bytes()
    before = rss_gib()
    cpu, wall = time.process_time(), time.monotonic()
    await keeper.restore(state, "bench", 0, 2)
    print(
        f"read back: {time.monotonic() - wall:.1f} s, {time.process_time() - cpu:.1f} s of CPU,"
        f" memory {before:.2f} to {rss_gib():.2f} GiB, {peak_gib():.2f} GiB at the most"
    )
    await keeper.close()
    print(digest_of(partition))


def digest_of(partition: Partition) -> str:
    """Of the vectors of all entities, an hour apart."""
    view = partition.state.store.views[partition.view.id]
    total = hashlib.blake2b()
    keys = sorted(view.entities)
    until_us = view.applied_until_us or 0
    for start in range(0, len(keys), 100_000):
        part = keys[start : start + 100_000]
        for hour in (0, 5):
            as_of_us = np.full(len(part), until_us + hour * HOUR_US)
            total.update(view.answer(part, as_of_us).tobytes())
    return total.hexdigest()


async def measure_sizes(folder: Path) -> None:
    """A small state, whole in the row, beside the same one in files: CPU of one checkpoint."""
    for entities in (100, 1_000, 3_000, 10_000, 30_000, 100_000):
        partition = Partition(plain_view())
        partition.whole = True
        fill(partition, entities)
        rng, now_us = np.random.default_rng(1), 24 * HOUR_US
        files = CountedFiles(folder / str(entities))
        spent: dict[str, list[float]] = {}
        for name, inline in (("row", 2**40), ("files", 0)):
            keeper = await opened(partition, files, 1, inline)
            for number in range(12):
                now_us += MINUTE_US
                keys = rng.integers(0, entities, 200)
                partition.state.add_events("e", frame_of(keys, np.full(200, now_us), rng))
                partition.state.advance(now_us + MINUTE_US)
                began = time.process_time()
                state = await (await keeper.save()).written() or b""
                keeper.committed()
                if number > 1:
                    spent.setdefault(name, []).append(time.process_time() - began)
                if name == "row":
                    size = len(state)
            await keeper.close()
        row, in_files = (np.median(spent[name]) * 1e3 for name in ("row", "files"))
        print(
            f"{entities:,} entities, {size / 1024:,.0f} KiB: {row:.2f} ms of CPU in the row,"
            f" {in_files:.2f} ms in files with 200 entities touched"
        )


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--entities", type=int, default=2_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--draw", choices=["uniform", "zipf"], default="uniform")
    parser.add_argument("--sizes", action="store_true")
    parser.add_argument("--restart", type=Path)
    arguments = parser.parse_args()
    if arguments.restart is not None:
        asyncio.run(read_back(arguments.restart))
        return
    with tempfile.TemporaryDirectory(prefix="checkpoints-") as folder:
        if arguments.sizes:
            asyncio.run(measure_sizes(Path(folder)))
        else:
            asyncio.run(measure(arguments.entities, arguments.rounds, arguments.draw, Path(folder)))


if __name__ == "__main__":
    main()
