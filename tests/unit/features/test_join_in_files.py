"""The joining stage with its state in files: restarts at any checkpoint do not show."""

from __future__ import annotations

import random
from typing import Any

import pytest

from causemesh.checkpoints import CheckpointSettings, Pieced, StateKeeper
from causemesh.checkpoints.manifest import is_manifest
from causemesh.runner.batch import NEVER
from services.features.domain import parts
from services.features.handlers import Join
from services.features.plan import tasks_topic
from services.features.rekey import Rekey
from tests.unit.checkpoints.memory import MemoryFiles
from tests.unit.features.test_handlers import World, join, registrations


async def kept(processor: Join, files: MemoryFiles, state: bytes | None, epoch: int) -> StateKeeper:
    keeper = StateKeeper(processor, CheckpointSettings(files, 0))
    await keeper.restore(state, "features", 0, epoch)
    await keeper.close()
    return keeper


async def tasks(world: World, order: int) -> tuple[list[tuple[Any, ...]], int]:
    """What is emitted, with a checkpoint now and then and a restart now and then, some units after
    it; and how many restarts there were. What is sent again is dropped by its position."""
    rng, files, epoch = random.Random(order), MemoryFiles(), 1
    processor = join()
    keeper = await kept(processor, files, None, epoch)
    await processor.process([registrations()], NEVER, None)
    units = list(world.units(rng))
    emitted: dict[int, tuple[Any, ...]] = {}
    at, saved = 0, (0, b"")
    while at < len(units):
        emission = await processor.process(*units[at], None)
        at += 1
        for part in emission.outgoing:
            assert part.topic == tasks_topic("realtime")
            columns = part.frame.select("version", "vector", "failure").rows()
            for position, row in zip(part.positions.tolist(), columns, strict=True):
                assert emitted.setdefault(position, row) == row, "another answer the second time"
        if rng.random() < 0.4:
            state = await (await keeper.save()).written()
            keeper.committed()
            assert state is not None
            assert is_manifest(state)
            saved = at, state
        if saved[0] and rng.random() < 0.2 and epoch < 12:
            epoch += 1
            processor = join()
            keeper = await kept(processor, files, saved[1], epoch)
            at = saved[0]
    await keeper.close()
    return [(position, *row) for position, row in sorted(emitted.items())], epoch - 1


@pytest.mark.parametrize("seed", range(6))
async def test_restarts_from_files_do_not_show(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "PIECE_BYTES", 1)
    monkeypatch.setattr(parts, "LEAST_ROWS", 2)
    world = await World(seed, "replay").make()
    found, restarts = await tasks(world, seed + 1)
    assert found == world.answers()
    assert restarts > 1


async def test_what_is_known_of_models_is_told_once_it_is_committed() -> None:
    processor = join()
    keeper = await kept(processor, MemoryFiles(), None, 1)
    await processor.process([registrations()], NEVER, None)
    save = await keeper.save()
    await save.written()
    assert processor.models()["versions"] == []
    keeper.committed()
    known = processor.models()["versions"]
    assert known == ["m@1", "m@2"]
    await keeper.save()
    await processor.process([], NEVER, None)
    await keeper.close()
    assert processor.models()["versions"] == known


def test_only_the_joining_stage_has_pieces() -> None:
    assert isinstance(join(), Pieced)
    assert not isinstance(Rekey(()), Pieced)
