"""States in files: what is committed is what is read back, whatever fails in between."""

from __future__ import annotations

import random
from typing import Any

import pytest

from causemesh.bus.memory import no_step
from causemesh.checkpoints import CheckpointSettings, Save, StateKeeper, keeper, planning
from causemesh.checkpoints.manifest import Manifest, is_manifest
from causemesh.errors import Fatal, Fenced, Misdeclared, Retryable
from causemesh.faultpoints import Point, arm
from causemesh.positions import Checkpoint, MemoryPositionStore, Unit
from causemesh.runner import PartitionWorker
from tests.unit.checkpoints.ledger import INBOX, Ledger, filled, worker_of
from tests.unit.checkpoints.memory import MemoryFiles

GROUP = "ledger"
FOLDER = "ledger/00000"
PIECED = ("pieces", "piece", "track", "replaced", "delta", "apply", "applied", "committed")


async def taken(kept: StateKeeper) -> bytes:
    """Save and commit at once."""
    save = await kept.save()
    state = await save.written()
    kept.committed()
    await kept.close()
    assert state is not None
    return state


async def opened(
    ledger: Ledger, files: MemoryFiles, state: bytes | None, epoch: int, **settings: Any
) -> StateKeeper:
    kept = StateKeeper(ledger, CheckpointSettings(files, **{"inline_bytes": 0, **settings}))
    await kept.restore(state, GROUP, 0, epoch)
    await kept.close()
    return kept


async def book(ledger: Ledger, *positions: int) -> None:
    for at in positions:
        ledger.pages[at % 4].append(at)
        if ledger._new is not None:
            ledger._new.append(at)


async def test_a_small_state_lies_in_the_row_and_a_larger_one_in_files() -> None:
    files, ledger = MemoryFiles(), Ledger()
    kept = await opened(ledger, files, None, 1, inline_bytes=60)
    await book(ledger, 1, 2)
    state = await taken(kept)
    assert not is_manifest(state)
    assert files.kept == {}
    await book(ledger, *range(3, 30))
    state = await taken(kept)
    assert set(files.kept) == Manifest.parse(state).files
    assert len(files.kept) == 4
    await book(ledger, 30)
    state = await taken(kept)
    assert len(files.kept) == 4, "a small delta lies in the row"
    assert len(Manifest.parse(state).tail) == 1
    await book(ledger, *range(31, 50))
    state = await taken(kept)
    assert len(Manifest.parse(state).deltas) == 1
    other = Ledger()
    await opened(other, files, state, 2, inline_bytes=60)
    assert other.pages == ledger.pages
    assert ledger.told == 4


@pytest.mark.parametrize("told", [True, False])
async def test_what_was_replaced_is_written_whole(
    told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control: where the ledger does not tell, another state comes back."""
    if not told:
        monkeypatch.setattr(Ledger, "replaced", lambda self: False)
    files, ledger, other = MemoryFiles(), Ledger(), Ledger()
    kept = await opened(ledger, files, None, 1)
    await book(ledger, *range(20))
    await taken(kept)
    before = set(files.kept)
    await book(ledger, 20)
    await taken(kept)
    ledger.swap()
    await book(ledger, 21)
    state = await taken(kept)
    await opened(other, files, state, 2)
    assert (other.pages == ledger.pages) == told
    if told:
        assert set(files.kept) == Manifest.parse(state).files
        assert not before & set(files.kept)
        await book(ledger, 22)
        await opened(other, files, await taken(kept), 3)
        assert other.pages == ledger.pages


async def test_a_state_that_lay_in_the_row_goes_on_in_files() -> None:
    """As after an upgrade, or with another limit."""
    ledger = Ledger()
    await book(ledger, *range(9))
    state = ledger.snapshot()
    files, other = MemoryFiles(), Ledger()
    kept = await opened(other, files, state, 5)
    assert is_manifest(await taken(kept))
    assert other.pages == ledger.pages


async def test_deltas_do_not_outgrow_the_pieces_and_files_are_few() -> None:
    files, ledger = MemoryFiles(), Ledger(padding=70_000)
    kept = await opened(ledger, files, None, 1)
    most = 0
    for at in range(300):
        await book(ledger, at)
        state = await taken(kept)
        manifest = Manifest.parse(state)
        most = max(most, manifest.delta_bytes)
        assert set(files.kept) == manifest.files, "what no manifest names is removed"
    assert most <= 3 * manifest.piece_bytes
    assert len(files.kept) <= planning._MANY + planning._TOGETHER + 4
    other = Ledger()
    await opened(other, files, state, 2)
    assert other.booked == list(range(300))


async def test_many_small_deltas_become_few_files() -> None:
    files, ledger = MemoryFiles(), Ledger()
    kept = await opened(ledger, files, None, 1)
    for at in range(400):
        await book(ledger, at)
        state = await taken(kept)
    manifest = Manifest.parse(state)
    assert all(piece.sequence == 1 for piece in manifest.pieces.values()), "none was due"
    assert len(files.kept) <= planning._MANY + planning._TOGETHER + 4
    other = Ledger()
    await opened(other, files, state, 2)
    assert other.pages == ledger.pages


def damaged(files: MemoryFiles, name: str, how: str) -> None:
    content = files.kept[name]
    if how == "missing":
        del files.kept[name]
    elif how == "torn":
        files.kept[name] = content[: len(content) // 2]
    elif how == "longer":
        files.kept[name] = content + b"more"
    else:
        files.kept[name] = content.replace(b"7", b"8")
        assert files.kept[name] != content


async def saved(files: MemoryFiles) -> bytes:
    ledger = Ledger()
    kept = await opened(ledger, files, None, 1)
    await book(ledger, *range(8))
    await taken(kept)
    await book(ledger, 17, 27)
    return await taken(kept)


@pytest.mark.parametrize("how", ["missing", "torn", "longer", "altered"])
async def test_a_file_that_is_not_as_it_was_is_named_and_nothing_is_restored(how: str) -> None:
    state = await saved(MemoryFiles())
    for name in sorted(Manifest.parse(state).files):
        files = MemoryFiles()
        assert await saved(files) == state, "the names depend on nothing else"
        if how == "altered" and b"7" not in files.kept[name]:
            continue
        damaged(files, name, how)
        with pytest.raises(Fatal, match=name) as failure:
            await opened(Ledger(), files, state, 2)
        if how == "missing":
            assert "storage that all of them reach" in str(failure.value)
            assert "memory://" in str(failure.value)


async def test_control_without_hashes_an_altered_file_is_a_wrong_state() -> None:
    files = MemoryFiles()
    state = await saved(files)
    (name,) = [name for name in files.kept if name.endswith("delta")]
    damaged(files, name, "altered")
    other = Ledger()
    await opened(other, files, state, 2, check_hashes=False)
    assert 18 in other.booked
    assert 17 not in other.booked


async def test_a_manifest_where_no_files_are_set_is_refused() -> None:
    state = await saved(MemoryFiles())
    with pytest.raises(Fatal, match="set CAUSEMESH_CHECKPOINTS"):
        await StateKeeper(Ledger()).restore(state, GROUP, 0, 2)


class Whole:
    """Knows no pieces."""

    def snapshot(self) -> bytes | None:
        return b"all of it"

    def restore(self, state: bytes | None) -> None: ...


@pytest.mark.parametrize("name", PIECED)
def test_a_processor_that_lacks_a_part_is_refused_by_the_part_s_name(name: str) -> None:
    """Else its state, however large, would go to the row in silence."""

    class Lacking(Ledger):
        def __getattribute__(self, asked: str) -> Any:
            if asked == name:
                raise AttributeError(asked)
            return super().__getattribute__(asked)

    settings = CheckpointSettings(MemoryFiles(), 0)
    with pytest.raises(Misdeclared, match=rf"Lacking has no {name}: see"):
        StateKeeper(Lacking(), settings)
    StateKeeper(Lacking())
    StateKeeper(Ledger(), settings)


async def test_a_processor_without_pieces_lies_in_the_row_and_only_there() -> None:
    with pytest.raises(Misdeclared, match=f"Whole has no {', '.join(PIECED)}: see"):
        StateKeeper(Whole(), CheckpointSettings(MemoryFiles(), 0))
    kept = StateKeeper(Whole())
    await kept.restore(None, GROUP, 0, 1)
    assert await taken(kept) == b"all of it"


async def commit(store: MemoryPositionStore, claim: Any, state: bytes | None) -> None:
    async with store.unit(claim) as unit:
        await unit.commit(Checkpoint(state=state))


async def replaced(*, fenced: bool) -> list[int]:
    """A worker writes files and pauses before its commit; another one takes over in between."""
    store, files = MemoryPositionStore(no_step, fenced=fenced), MemoryFiles()
    first = Ledger()
    claim, _ = await store.claim(GROUP, 0)
    kept = await opened(first, files, None, claim.epoch)
    await book(first, *range(8))
    await commit(store, claim, await taken(kept))
    await book(first, 8)
    late = await (await kept.save()).written()

    second = Ledger()
    claim_2, stored = await store.claim(GROUP, 0)
    assert stored is not None
    before = set(files.kept)
    kept_2 = await opened(second, files, stored.state, claim_2.epoch)
    assert len(before - set(files.kept)) == 1, "the new owner removes what was not committed"
    try:
        await commit(store, claim, late)
    except Fenced:
        await book(second, 8)
        await commit(store, claim_2, await taken(kept_2))

    third = Ledger()
    claim_3, stored = await store.claim(GROUP, 0)
    assert stored is not None
    await opened(third, files, stored.state, claim_3.epoch)
    return third.booked


async def test_a_replaced_worker_writes_files_but_no_manifest() -> None:
    assert await replaced(fenced=True) == list(range(9))


async def test_control_without_the_fence_a_manifest_names_files_that_are_gone() -> None:
    with pytest.raises(Fatal, match=f"{FOLDER}/0000000001-0000000002-delta is not under"):
        await replaced(fenced=False)


async def test_files_of_a_later_owner_are_left_alone() -> None:
    """Who was paused between its claim and its sweep."""
    files = MemoryFiles()
    files.kept[f"{FOLDER}/0000000007-0000000003-delta"] = b"of the next owner"
    files.kept[f"{FOLDER}/0000000005-0000000003-delta"] = b"of a lost commit"
    files.kept[f"{FOLDER}/0000000005-0000000004-delta.part"] = b"half of one"
    files.kept[f"{FOLDER}/README"] = b"a person's"
    await opened(Ledger(), files, None, 6)
    assert sorted(files.kept) == [f"{FOLDER}/0000000007-0000000003-delta", f"{FOLDER}/README"]


async def test_what_a_replaced_worker_writes_late_is_swept_too() -> None:
    """Ten seconds after the claim, twenty after that, and so on."""
    clock, files = [0.0], MemoryFiles()
    kept = StateKeeper(Ledger(), CheckpointSettings(files, 0), lambda: clock[0])
    await kept.restore(None, GROUP, 0, 6)
    await kept.close()
    swept = []
    for second in range(80):
        clock[0] = float(second)
        late = f"{FOLDER}/0000000005-{second:010}-delta"
        files.kept.setdefault(late, b"of a worker that was replaced")
        state = await taken(kept)
        if late not in files.kept:
            swept.append(second)
        assert Manifest.parse(state).files <= set(files.kept), "its own stay"
    assert swept == [10, 30, 70]


class TooNew(PartitionWorker):
    """Control arm: commits the position of now with a state that was taken earlier."""

    async def _commit(self, unit: Unit, taken: tuple[Checkpoint, Save]) -> None:
        await super()._commit(unit, (self._checkpoint(), taken[1]))


async def crashing(
    rng: random.Random, kind: type[PartitionWorker] = PartitionWorker, count: int = 60
) -> list[int]:
    """Workers of one partition, one after the other, each ended by something; what is booked."""
    bus, store = await filled(count), MemoryPositionStore(no_step)
    files = MemoryFiles(slow_s=0.001)
    points = [Point.WORKER_FETCHED, Point.WORKER_PROCESSED, Point.WORKER_SENT]
    points += [Point.WORKER_COMMITTING, Point.WORKER_COMMITTED]
    settings = CheckpointSettings(files, rng.choice([0, 200]))
    for _ in range(12):
        files._fails = lambda: rng.random() < 0.05
        arm(f"{rng.choice(points)}:error:{rng.randint(1, 8)}")
        units = rng.randint(1, 3)
        worker = worker_of(Ledger(), bus, store, settings, kind, commit_every_units=units)
        try:
            await worker.run()
        except Retryable:
            continue
    arm("")
    files._fails = lambda: False
    last = Ledger()
    await worker_of(last, bus, store, settings, kind).run()
    final = Ledger()
    (row,) = store.rows.values()
    assert row.checkpoint is not None
    assert row.checkpoint.positions[(INBOX, 0)] == count - 1
    await opened(final, files, row.checkpoint.state, row.epoch + 1)
    assert row.checkpoint.state is not None
    if is_manifest(row.checkpoint.state):
        assert set(files.kept) == Manifest.parse(row.checkpoint.state).files
    assert final.booked == last.booked
    return final.booked


@pytest.fixture
def disarmed() -> Any:
    yield
    arm("")


@pytest.mark.usefixtures("disarmed")
@pytest.mark.parametrize("seed", range(25))
async def test_crashes_between_files_and_commit_and_removal_change_nothing(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper, "_ATTEMPTS", 1 + seed % 2)
    assert await crashing(random.Random(seed)) == list(range(60))


@pytest.mark.usefixtures("disarmed")
async def test_control_a_state_and_a_position_of_two_moments_lose_records() -> None:
    found = [await crashing(random.Random(seed), TooNew) for seed in range(8)]
    assert any(booked != list(range(60)) for booked in found)


async def test_a_costly_checkpoint_is_rested_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """One part in 25 of the processor's time, and thirty seconds at the most."""
    now = {"clock": 0.0, "processor": 0.0, "thread": 0.0}
    monkeypatch.setattr(keeper.time, "process_time", lambda: now["processor"])
    monkeypatch.setattr(keeper.time, "thread_time", lambda: now["thread"])
    ledger = Ledger()
    settings = CheckpointSettings(MemoryFiles(), 0)
    kept = StateKeeper(ledger, settings, lambda: now["clock"])
    await kept.restore(None, GROUP, 0, 1)
    await taken(kept)
    assert not kept.rests, "the first one is no measure"

    def costly() -> bytes:
        now["thread"] += 0.1
        return b'{"new": []}'

    monkeypatch.setattr(ledger, "delta", lambda: costly)
    await taken(kept)
    now["processor"] += 2.3
    assert kept.rests
    now["processor"] += 0.2
    assert not kept.rests
    await taken(kept)
    now["clock"] += 29.0
    assert kept.rests
    now["clock"] += 1.1
    assert not kept.rests


async def test_under_load_units_go_on_while_files_are_written() -> None:
    files = MemoryFiles(slow_s=0.02)
    bus, store = await filled(90), MemoryPositionStore(no_step)
    seen: list[tuple[int, int]] = []

    class Watched(PartitionWorker):
        async def _commit(self, unit: Unit, taken: tuple[Checkpoint, Save]) -> None:
            at = taken[0].positions[(INBOX, 0)]
            seen.append((at, self.positions[(INBOX, 0)]))
            await super()._commit(unit, taken)

    ledger = Ledger()
    await worker_of(ledger, bus, store, CheckpointSettings(files, 0), Watched).run()
    assert any(now - at >= 6 for at, now in seen), "no unit was done in between"
    assert seen[-1] == (89, 89)
    assert ledger.booked == list(range(90))
