"""Upkeep changes files and snapshots, never what is found; retention takes whole days."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from pyiceberg.table import Table

from causemesh.errors import Misdeclared
from causemesh.lake import upkeep
from causemesh.lake.commits import Change
from causemesh.lake.progress import PartitionProgress, TableProgress
from causemesh.lake.upkeep import Compacted, UpkeepLimits
from services.features.lake.sinks import Writing
from tests.unit.lake.mesh import DAY_US, PREDICTIONS, START_US, LakeMesh, instants

DECODED = "decoded.inference_predictions_v1"
NOW = UpkeepLimits(small_files=2, snapshot_s=0, snapshots=1, orphan_s=-120)
"""Everything is old, also what was written within the last minutes."""


@pytest.fixture
def mesh(tmp_path: Path) -> LakeMesh:
    return LakeMesh(tmp_path, curated=())


def files(mesh: LakeMesh) -> int:
    return len(list(mesh.lake().table(DECODED).scan().plan_files()))


async def same_days(mesh: LakeMesh, lives_: int) -> None:
    """Lives whose records all fall on the same two days."""
    for life in range(lives_):
        days = [START_US + (n % 2) * DAY_US for n in range(8)]
        await mesh.predict(life * 8, 8, occurred_at=instants(days))
        await mesh.write_all()


async def test_compaction_leaves_one_file_a_tenant_and_day_and_every_row(mesh: LakeMesh) -> None:
    await same_days(mesh, 5)
    before = mesh.lake().select(DECODED).lazy().sort("_position").collect()
    progress = mesh.lake().progress(DECODED)
    done = upkeep.compact(mesh.catalog(), DECODED, NOW)
    assert done == Compacted(2, 10, 2)
    assert files(mesh) == 2
    assert mesh.lake().select(DECODED).lazy().sort("_position").collect().equals(before)
    assert mesh.lake().progress(DECODED) == progress
    assert upkeep.compact(mesh.catalog(), DECODED, NOW) == Compacted()
    await mesh.predict(40, 8)
    await mesh.write_all()
    assert mesh.rows(DECODED) == mesh.logged(PREDICTIONS)


async def test_a_writer_that_commits_in_between_loses_nothing(
    mesh: LakeMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compaction has read the files and written new ones when the writer's commit comes."""
    await same_days(mesh, 3)
    await mesh.predict(24, 8)
    store = mesh.store()
    await mesh.read_all(store, 0)
    sinks = [sink for by in store._sinks.values() for sink in by.values()]
    rewritten = upkeep._rewritten

    def meanwhile(*asked: object) -> object:
        done = rewritten(*asked)  # type: ignore[arg-type]
        for sink in sinks:
            if sink.take():
                sink.flush()
        return done

    monkeypatch.setattr(upkeep, "_rewritten", meanwhile)
    assert upkeep.compact(mesh.catalog(), DECODED, NOW).files_before == 6
    assert mesh.rows(DECODED) == mesh.logged(PREDICTIONS)


async def test_two_compactions_at_once_double_nothing(
    mesh: LakeMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    await same_days(mesh, 3)
    rewritten, began = upkeep._rewritten, []

    def meanwhile(*asked: object) -> object:
        done = rewritten(*asked)  # type: ignore[arg-type]
        if not began:
            began.append(True)
            assert upkeep.compact(mesh.catalog(), DECODED, NOW).partitions == 2
        return done

    monkeypatch.setattr(upkeep, "_rewritten", meanwhile)
    assert upkeep.compact(mesh.catalog(), DECODED, NOW) == Compacted()
    assert mesh.rows(DECODED) == mesh.logged(PREDICTIONS)


async def test_retention_goes_by_event_time_and_takes_whole_days(mesh: LakeMesh) -> None:
    """2013 is kept in whatever year it is replayed; its oldest days go by its newest."""
    await mesh.predict(0, 40)  # ten days
    await mesh.write_all()
    definition = replace(mesh.definition.table(DECODED), retention_days=3)
    progress = mesh.lake().progress(DECODED)
    gone = upkeep.retain(mesh.catalog(), definition)
    first = datetime(2013, 1, 7, tzinfo=UTC)
    left = mesh.lake().select(DECODED).lazy().collect()
    assert left["occurred_at"].min() == first
    assert gone == 24 == 40 - left.height
    assert mesh.lake().progress(DECODED) == progress
    assert upkeep.retain(mesh.catalog(), definition) == 0
    await mesh.write_all()
    assert len(mesh.rows(DECODED)) == 16


def test_the_horizon_waits_for_the_watermark() -> None:
    """One event from the far future must not take the present out."""
    promised = PartitionProgress(1, 5, [], [["inbox.x", 0, 10 * DAY_US]])
    assert TableProgress({0: promised}).watermark_us() == 10 * DAY_US
    assert TableProgress({0: promised, 1: PartitionProgress()}).watermark_us() is None

    class File:
        def __init__(self, day: int) -> None:
            self.partition = ("t", day)

    found = [File(8), File(90_000)]
    assert upkeep.horizon(found, TableProgress({0: promised}), 3) == 7  # type: ignore[arg-type]


async def test_expiry_and_sweep_keep_the_rows_and_the_progress(
    mesh: LakeMesh, tmp_path: Path
) -> None:
    await same_days(mesh, 4)
    upkeep.compact(mesh.catalog(), DECODED, NOW)
    folder = tmp_path / "tables" / "decoded" / "inference_predictions_v1"
    parquet = sorted(folder.rglob("*.parquet"))
    assert len(parquet) == 8 + 2
    assert upkeep.expire(mesh.catalog(), DECODED, NOW) > 4
    assert len(mesh.lake().snapshots(DECODED)) == 1
    orphan = folder / "data" / "orphan.parquet"
    orphan.write_bytes(b"what a crash left")
    assert upkeep.sweep(mesh.catalog(), DECODED, replace(NOW, orphan_s=3_600)) == 0
    assert orphan.exists()
    assert upkeep.sweep(mesh.catalog(), DECODED, NOW) > 8
    assert not orphan.exists()
    assert len(sorted(folder.rglob("*.parquet"))) == 2
    assert mesh.rows(DECODED) == mesh.logged(PREDICTIONS)
    assert upkeep.sweep(mesh.catalog(), DECODED, NOW) == 0
    await mesh.predict(32, 4)
    await mesh.write_all()
    assert mesh.rows(DECODED) == mesh.logged(PREDICTIONS)


async def test_files_swept_before_their_commit_are_written_again(
    mesh: LakeMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer was paused for a day between its files and their commit."""
    await same_days(mesh, 1)
    assert await paused_over_a_sweep(mesh, monkeypatch) == mesh.logged(PREDICTIONS)


async def test_control_without_the_cutoff_the_table_would_name_files_that_are_gone(
    mesh: LakeMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    await same_days(mesh, 1)
    monkeypatch.setattr(TableProgress, "may_have_swept", lambda self, written_us: False)
    with pytest.raises(FileNotFoundError):
        await paused_over_a_sweep(mesh, monkeypatch)


async def paused_over_a_sweep(
    mesh: LakeMesh, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[int, int]]:
    await mesh.predict(8, 8)
    store = mesh.store()
    await mesh.read_all(store, 0)
    decide, swept = Writing.decide, []

    def paused(self: Writing, table: Table, progress: TableProgress) -> Change | None:
        change = decide(self, table, progress)
        if self.rows and not swept:
            swept.append(upkeep.sweep(mesh.catalog(), DECODED, NOW))
            self._written_us -= round(timedelta(days=1).total_seconds() * 1e6)
        return change

    monkeypatch.setattr(Writing, "decide", paused)
    await store.flush()
    assert swept[0] > 0
    return mesh.rows(DECODED)


async def test_an_old_snapshot_is_read_as_it_was_until_it_expires(mesh: LakeMesh) -> None:
    await same_days(mesh, 2)
    first = next(one for one in mesh.lake().snapshots(DECODED) if one["records"] == 8)
    upkeep.compact(mesh.catalog(), DECODED, NOW)
    lake = mesh.lake()
    assert lake.select(DECODED, snapshot_id=first["snapshot_id"]).lazy().collect().height == 8
    assert lake.progress(DECODED, first["snapshot_id"]).of(0).position == 7
    upkeep.expire(mesh.catalog(), DECODED, NOW)
    with pytest.raises(Misdeclared, match="may have expired"):
        mesh.lake().select(DECODED, snapshot_id=first["snapshot_id"])
