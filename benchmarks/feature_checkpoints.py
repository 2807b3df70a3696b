"""What checkpoints of a large state cost, and how soon a restart has it back.

usage: python -m benchmarks.feature_checkpoints [--entities 2000000] [--units 1200] [--rounds 3]
           [--draw uniform] [--dry]

One partition of two million entities, a view of ten features over 13 tiles, the files in a folder
of this machine. Then, in turn, the same load of events (20,000 a unit, entities drawn evenly: the
worst case) without checkpoints and with them, due as the service's are; to make the events is not
counted, threads are. At last the state is read back in a process of its own, from files that are in
no cache, and the vectors of all entities are compared. Where nothing was written there is no
result.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.feature_checkpoints_load import (
    COMMIT_UNITS,
    HOUR_US,
    INLINE,
    MIB,
    UNIT,
    Clock,
    CountedFiles,
    Load,
    Partition,
    Writer,
    fill,
    opened,
    plain_view,
)
from benchmarks.harness import Arm, Figures, rounds, run_command, save, show, table, versions
from benchmarks.service_run import peak_rss_mb
from causemesh.checkpoints import CheckpointSettings, LocalFiles, StateKeeper
from causemesh.checkpoints.manifest import Manifest, is_manifest
from causemesh.collector import collect_seldom

FIRST, WITHOUT, WITH, RESTART = (
    "first checkpoint",
    "without checkpoints",
    "with checkpoints",
    "restart",
)
_MANIFEST = "manifest"
_WARM = 2
"""Checkpoints before a round counts: the next one's rest then comes from one as large as it."""


class Bench:
    """A large state, and what is measured of it. Every figure is of one round."""

    def __init__(
        self, entities: int, units: int, draw: str, folder: Path, inline: int = INLINE
    ) -> None:
        self.partition = Partition(plain_view())
        fill(self.partition, entities)
        self._entities = entities
        self._units = units
        self._folder = folder
        self._inline = inline
        self._load = Load(self.partition, entities, draw)
        self._files = CountedFiles(folder)
        self._keeper: StateKeeper | None = None
        self._epoch = 0
        self._digest = ""
        self._loop = asyncio.Runner()  # one for all: a keeper's tasks belong to it

    def close(self) -> None:
        """End the event loop."""
        self._loop.close()

    def first(self) -> Figures:
        """Write all pieces. Raises RuntimeError when that wrote no file."""
        before = len(self._files.sizes["piece"])
        cpu, wall = time.process_time(), time.monotonic()
        state = self._loop.run(self._first())
        spent = {"seconds": time.monotonic() - wall, "cpu_seconds": time.process_time() - cpu}
        sizes = self._files.sizes["piece"][before:]
        if not sizes or not is_manifest(state):
            raise RuntimeError("the first checkpoint wrote no file")
        return {
            **spent,
            "mib": sum(sizes) / MIB,
            "files": len(sizes),
            "manifest_kib": len(state) / 1024,
            "entities_per_second": self._entities / spent["seconds"],
        }

    async def _first(self) -> bytes:
        """As a worker that claims anew; the state is there already."""
        self._epoch += 1
        self._keeper = await opened(self.partition, self._files, self._epoch, self._inline)
        state = await (await self._keeper.save()).written() or b""
        self._keeper.committed()
        await self._keeper.close()
        return state

    def without(self) -> Figures:
        """The load alone."""
        self.partition.forget_changes()
        clock = Clock(self._load)
        for _ in range(self._units):
            self._load.unit(self._load.frame())
        return clock.rates(self._units)

    def with_checkpoints(self) -> Figures:
        """The load, and checkpoints; from a commit to a commit, so that each counts whole.

        They follow on the first checkpoint, but lack what the rounds without them changed: they
        cost what they should, and nobody reads them. Raises RuntimeError when they wrote no delta.
        """
        self.partition.track()
        return self._loop.run(self._with_checkpoints())

    async def _with_checkpoints(self) -> Figures:
        assert self._keeper is not None
        writer = Writer(self._keeper)
        while writer.commits < _WARM:
            await self._unit(writer)
        before = {kind: len(sizes) for kind, sizes in self._files.sizes.items()}
        clock, units, fresh, took_s = Clock(self._load), 0, False, writer.took_s
        while units < self._units or not fresh:
            committed = writer.commits
            await self._unit(writer)
            units, fresh = units + 1, writer.commits > committed
        figures = clock.rates(units)
        cost = (writer.took_s - took_s) / figures["cpu_seconds"]
        await writer.finish()
        await self._keeper.close()
        new = {kind: sizes[before[kind] :] for kind, sizes in self._files.sizes.items()}
        if not new["delta"]:
            raise RuntimeError("checkpoints wrote no delta to a file")
        count = writer.commits - _WARM
        return {
            **figures,
            "cost_percent": 100 * cost,
            "checkpoints": count,
            "delta_mib": sum(new["delta"]) / MIB / count,
            "largest_delta_mib": max(new["delta"]) / MIB,
            "pieces_anew_mib": sum(new["piece"]) / MIB / count,
            "merged_mib": sum(new["deltas"]) / MIB / count,
            "peak_rss_mb": peak_rss_mb(),
        }

    async def _unit(self, writer: Writer) -> None:
        self._load.unit(self._load.frame())
        await writer.after_unit()

    def prepare_restart(self) -> None:
        """A state as a crash leaves it: all pieces, and deltas since."""
        state = self._loop.run(self._followed())
        (self._folder / _MANIFEST).write_bytes(state)
        self._digest = digest_of(self.partition)

    async def _followed(self) -> bytes:
        assert self._keeper is not None
        writer = Writer(self._keeper)
        for _ in range(4 * COMMIT_UNITS):
            await self._unit(writer)
        await writer.last()
        await self._keeper.close()
        return writer.state

    def restart(self) -> Figures:
        """Read it back in a process of its own. Raises RuntimeError when it is another state."""
        manifest = Manifest.parse((self._folder / _MANIFEST).read_bytes())
        for name in manifest.files:
            with (self._folder / name).open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        argv = [sys.executable, "-m", "benchmarks.feature_checkpoints", "--restart"]
        told = run_command([*argv, str(self._folder)])
        if told.pop("digest") != self._digest:
            raise RuntimeError("the restored state is not the one that was written")
        read = (manifest.piece_bytes + manifest.delta_bytes) / MIB
        rate = self._entities / told["seconds"]
        return {**told, "mib": read, "files": len(manifest.files), "entities_per_second": rate}


async def read_back(folder: Path) -> dict[str, float | str]:
    """The process that restarts: what it took, and a digest of what it read."""
    partition = Partition(plain_view())
    keeper = StateKeeper(partition, CheckpointSettings(LocalFiles(folder), INLINE))
    cpu, wall = time.process_time(), time.monotonic()
    await keeper.restore((folder / _MANIFEST).read_bytes(), "bench", 0, 9)
    figures: dict[str, float | str] = {
        "seconds": time.monotonic() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "peak_rss_mb": peak_rss_mb(),
    }
    await keeper.close()
    return {**figures, "digest": digest_of(partition)}


def digest_of(partition: Partition) -> str:
    """Of the vectors of all entities, at the state's time and five hours later."""
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


def measure(bench: Bench, count: int) -> tuple[list[Arm], dict[str, list[Figures]]]:
    """All arms, each in so many rounds; the first checkpoint twice."""
    arms = [
        Arm(WITHOUT, bench.without, rate="events_per_cpu_second"),
        Arm(WITH, bench.with_checkpoints, rate="events_per_cpu_second"),
    ]
    first = Arm(FIRST, bench.first, rate="entities_per_second")
    restart = Arm(RESTART, bench.restart, rate="entities_per_second")
    firsts = rounds([first], 1)[FIRST]
    found = rounds(arms, count)
    show(arms, found)
    found[FIRST] = firsts + rounds([first], 1)[FIRST]
    bench.prepare_restart()
    found |= rounds([restart], count)
    return [*arms, first, restart], found


def main(asked_for: Sequence[str] | None = None) -> None:
    """Measure and save."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--entities", type=int, default=2_000_000)
    parser.add_argument("--units", type=int, default=1_200, help="units of work in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--draw", choices=["uniform", "zipf"], default="uniform")
    parser.add_argument("--restart", type=Path, help="the process that reads back, by itself")
    parser.add_argument("--dry", action="store_true", help="print, save nothing")
    asked = parser.parse_args(asked_for)
    collect_seldom()  # as every service does
    if asked.restart is not None:
        print(json.dumps({"figures": asyncio.run(read_back(asked.restart))}))
        return
    with tempfile.TemporaryDirectory(prefix="causemesh-checkpoints-") as folder:
        bench = Bench(asked.entities, asked.units, asked.draw, Path(folder))
        memory_mb = bench.partition.state.memory_bytes() / 1e6
        try:
            arms, found = measure(bench, asked.rounds)
        finally:
            bench.close()
    for arm in arms:
        for one in found[arm.name]:
            print(f"{arm.name}: " + ", ".join(f"{name} {of:,.2f}" for name, of in one.items()))
    if not asked.dry:
        about = {
            "entities": asked.entities,
            "features": len(plain_view().features),
            "state_mb": round(memory_mb),
            "events_a_round": asked.units * UNIT,
            "draw": asked.draw,
        }
        save(
            "checkpoints", {"arms": table(arms, found)}, about=about, of=versions("polars", "numpy")
        )


if __name__ == "__main__":
    main()
