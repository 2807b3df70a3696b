"""The lake equals its log: whoever crashes, is replaced, sends again or writes nonsense."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from pyiceberg.table import Table

from causemesh.errors import Fatal, Fenced, Misdeclared, Retryable
from causemesh.faultpoints import arm
from causemesh.lake.commits import Change
from causemesh.lake.progress import TableProgress
from causemesh.lake.tables import NO_RETRIES
from causemesh.positions import Checkpoint, Claim
from services.features.lake.sinks import Sink, Writing
from services.features.lake.store import FlushLimits, LakeStore
from tests.unit.lake.mesh import (
    CURATED,
    PREDICTIONS,
    REQUESTS,
    START_US,
    LakeMesh,
    instants,
)

DECODED, ASIDE, RAW = (
    "decoded.inference_predictions_v1",
    "raw.inference_predictions_v1",
    "raw.inbox_requests",
)


@pytest.fixture
def mesh(tmp_path: Path) -> LakeMesh:
    return LakeMesh(tmp_path)


async def test_every_record_is_a_row_under_its_tenant_and_day(mesh: LakeMesh) -> None:
    for partition in (0, 1):
        await mesh.predict(100 * partition, 20, partition)
    await mesh.write_all()
    assert mesh.rows(DECODED) == mesh.logged(PREDICTIONS)
    lake = mesh.lake()
    rows = lake.select(DECODED).lazy().sort("_partition", "_position").collect()
    assert rows["request_id"].to_list() == [f"r{n}" for n in (*range(20), *range(100, 120))]
    assert rows["cause"].struct.field("position").to_list()[:2] == [0, 1]
    files = [task.file for task in lake.table(DECODED).scan().plan_files()]
    assert len(files) == len(
        {(row["tenant_id"], row["occurred_at"].date()) for row in rows.to_dicts()}
    )
    curated = lake.select("curated.predictions").lazy().sort("_partition", "_position").collect()
    assert curated["request_id"].to_list() == [
        row["request_id"] for row in rows.to_dicts() if row["outcome"] == "predicted"
    ]
    assert curated["likely"].to_list() == pytest.approx(
        [row["score"] * 100 for row in rows.to_dicts() if row["outcome"] == "predicted"]
    )


async def test_a_second_life_goes_on_where_the_tables_end(mesh: LakeMesh) -> None:
    await mesh.predict(0, 20)
    await mesh.write_all()
    await mesh.predict(20, 20)
    await mesh.write_all()
    assert mesh.rows(DECODED) == mesh.logged(PREDICTIONS)
    progress = mesh.lake().progress(DECODED)
    assert (progress.of(0).position, progress.of(0).epoch) == (39, 2)


async def test_what_waits_in_memory_at_a_crash_is_read_again(mesh: LakeMesh) -> None:
    await mesh.predict(0, 20)
    await mesh.read_all(mesh.store(), 0)  # and it is gone
    assert mesh.rows(DECODED) == []
    await mesh.write_all()
    assert mesh.rows(DECODED) == mesh.logged(PREDICTIONS)


async def test_records_sent_again_count_once(mesh: LakeMesh) -> None:
    """The log holds a cause twice, also across lives of the writer; the table once."""
    await mesh.predict(0, 20)
    await mesh.predict(10, 15)
    await mesh.write_all()
    await mesh.predict(15, 12)
    await mesh.write_all()
    ids = mesh.lake().select(DECODED).lazy().collect()["request_id"].to_list()
    assert sorted(ids) == sorted(f"r{n}" for n in range(27))


async def test_a_replaced_writer_is_refused(mesh: LakeMesh) -> None:
    """It was paused with rows in memory; its successor has claimed and written more."""
    await mesh.predict(0, 20)
    old = mesh.store()
    claim, _ = await old.claim(mesh.group, 0)
    await mesh.read_all(old, 0)
    await mesh.predict(20, 5)
    await mesh.write_all()
    await old.flush()
    assert mesh.rows(DECODED) == mesh.logged(PREDICTIONS)
    with pytest.raises(Fenced):
        async with old.unit(claim):
            """It hears of it at its next unit."""


async def test_a_replaced_writer_is_refused_before_its_successor_wrote(mesh: LakeMesh) -> None:
    """The claim alone fences, or whose rows a table gets would be a race."""
    await mesh.predict(0, 20)
    old = mesh.store()
    await mesh.read_all(old, 0)
    await mesh.store().claim(mesh.group, 0)
    await old.flush()
    assert mesh.rows(DECODED) == []


class Blind(Writing):
    """Commits what it has, whatever the table says: no epoch, no position."""

    def decide(self, table: Table, progress: TableProgress) -> Change | None:
        zero = {
            number: replace(one, epoch=0, position=part.after)
            for number, one in progress.partitions.items()
            if (part := self._taken.get(number)) is not None
        }
        return super().decide(table, progress.having(zero))


class BlindSink(Sink):
    writing = Blind


class BlindStore(LakeStore):
    sink = BlindSink


async def test_control_without_epoch_and_position_a_replaced_writer_doubles(tmp_path: Path) -> None:
    mesh = LakeMesh(tmp_path, store=BlindStore)
    await mesh.predict(0, 20)
    old = mesh.store()
    await mesh.read_all(old, 0)
    await mesh.write_all()
    await old.flush()
    assert len(mesh.rows(DECODED)) == 40


async def test_control_with_the_librarys_own_repeats_a_lost_race_doubles(
    mesh: LakeMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pyiceberg commits again on top of the winner, as decided before: so it is switched off."""
    assert await raced(mesh) == mesh.logged(PREDICTIONS)
    monkeypatch.setattr("causemesh.lake.commits._check", lambda table: None)
    assert len(await raced(mesh, retries="4")) > len(mesh.logged(PREDICTIONS))


async def raced(mesh: LakeMesh, retries: str = "0") -> list[tuple[int, int]]:
    """A successor claims and commits between another's decision and its commit."""
    await mesh.predict(len(mesh.logged(PREDICTIONS)), 10)
    old, new = mesh.store(), mesh.store()
    await mesh.read_all(old, 0)
    with mesh.lake().table(DECODED).transaction() as change:
        change.set_properties({NO_RETRIES: retries})

    class Slow(Writing):
        def decide(self, table: Table, progress: TableProgress) -> Change | None:
            change = super().decide(table, progress)
            if table.name()[-1] == DECODED.split(".")[1] and not raced_once:
                raced_once.append(True)
                run(mesh, new)
            return change

    raced_once: list[bool] = []
    for sinks in old._sinks.values():
        for sink in sinks.values():
            sink.writing = Slow
    await old.flush()
    return mesh.rows(DECODED)


def run(mesh: LakeMesh, store: LakeStore) -> None:
    """A whole life of a writer, inside of another's commit."""

    async def life() -> None:
        await mesh.read_all(store, 0)
        await store.flush()

    asyncio.run(life())


async def test_a_table_that_repeats_commits_is_refused(mesh: LakeMesh) -> None:
    await mesh.predict(0, 5)
    await mesh.write_all()
    with mesh.lake().table(DECODED).transaction() as change:
        change.set_properties({NO_RETRIES: "4"})
    with pytest.raises(Fatal, match=r"num-retries must be 0"):
        await mesh.store().claim(mesh.group, 0)


@pytest.mark.parametrize("point", ["lake.writing", "lake.written", "lake.committed"])
async def test_a_commit_that_failed_at_any_step_is_repeated_once(
    point: str, mesh: LakeMesh
) -> None:
    """lake.committed: the commit came through and its answer was lost."""
    await mesh.predict(0, 20)
    store = mesh.store()
    await mesh.read_all(store, 0)
    try:
        for count in (1, 1):  # curated first, then decoded
            arm(f"{point}:error:{count}")
            with pytest.raises(Retryable):
                await store.flush()
        await store.flush()
    finally:
        arm("")
    assert mesh.rows(DECODED) == mesh.logged(PREDICTIONS)
    assert len(mesh.rows("curated.predictions")) == 16


async def test_a_table_rolled_back_is_filled_again(mesh: LakeMesh) -> None:
    """The position goes back with the data; a writer with later rows in memory is refused."""
    await mesh.predict(0, 10)
    await mesh.write_all()
    before = mesh.lake().table(DECODED).current_snapshot()
    assert before is not None
    running = mesh.store()
    await mesh.predict(10, 10)
    await mesh.read_all(running, 0)
    await running.flush()
    await mesh.predict(20, 10)
    table = mesh.lake().table(DECODED)
    table.manage_snapshots().rollback_to_snapshot(before.snapshot_id).commit()
    assert len(mesh.rows(DECODED)) == 10
    await mesh.write_all()
    assert mesh.rows(DECODED) == mesh.logged(PREDICTIONS)
    assert len(mesh.rows("curated.predictions")) == 24


async def test_rows_beyond_a_gap_are_refused(mesh: LakeMesh) -> None:
    await mesh.predict(0, 10)
    await mesh.write_all()
    before = mesh.lake().table(DECODED).current_snapshot()
    assert before is not None
    await mesh.predict(10, 10)
    await mesh.write_all()
    await mesh.predict(20, 10)
    late = mesh.store()
    await mesh.read_all(late, 0)  # from 20 on
    claim = Claim(mesh.group, 0, mesh.lake().progress(DECODED).of(0).epoch)
    table = mesh.lake().table(DECODED)
    table.manage_snapshots().rollback_to_snapshot(before.snapshot_id).commit()
    await late.flush()
    assert len(mesh.rows(DECODED)) == 10
    with pytest.raises(Retryable, match="rolled back"):  # so its worker starts over
        async with late.unit(claim):
            """It hears of it at its next unit."""
    await mesh.read_all(late, 0)
    await late.flush()
    assert mesh.rows(DECODED) == mesh.logged(PREDICTIONS)


async def test_the_largest_table_is_committed_when_memory_is_short(tmp_path: Path) -> None:
    limits = FlushLimits(seconds=1e6, position_s=1e6, size_bytes=1)
    mesh = LakeMesh(tmp_path, limits=limits)
    await mesh.predict(0, 20)
    store = mesh.store()
    running = asyncio.create_task(store.run())
    await mesh.read_all(store, 0)
    async with asyncio.timeout(20):
        while mesh.rows(DECODED) != mesh.logged(PREDICTIONS):  # noqa: ASYNC110 - polls a table
            await asyncio.sleep(0.05)
    running.cancel()


async def test_what_does_not_decode_goes_aside_with_its_bytes_and_reason(mesh: LakeMesh) -> None:
    await mesh.predict(0, 5)
    good = mesh.bus.log(PREDICTIONS, 0).values[0]
    bad = [b"", b"\x00\x00\x00\x00\x63xx", good[:-3], b"plain"]
    await mesh.lay(PREDICTIONS, bad, 0)
    await mesh.predict(5, 5)
    await mesh.write_all()
    assert mesh.rows(DECODED) == [(0, n) for n in (*range(5), *range(9, 14))]
    aside = mesh.lake().select(ASIDE).lazy().sort("_position").collect()
    assert aside["value"].to_list() == bad
    assert aside["_position"].to_list() == [5, 6, 7, 8]
    assert aside["tenant_id"].to_list() == ["-"] * 4
    assert all(aside["reason"].str.len_chars() > 10)
    await mesh.write_all()
    assert len(mesh.rows(ASIDE)) == 4


async def test_an_instant_that_no_date_can_tell_goes_aside(mesh: LakeMesh) -> None:
    """A block of records decodes it; one by one it would not."""
    mesh.max_records = 100
    await mesh.predict(0, 30, occurred_at=instants([START_US, 2**60, *[START_US] * 28]))
    await mesh.write_all()
    assert mesh.rows(DECODED) == [(0, n) for n in range(30) if n != 1]
    assert mesh.lake().select(ASIDE).lazy().collect()["reason"].to_list() == [
        "occurred_at lies outside the years 1 to 9999"
    ]


async def test_the_inbox_is_kept_as_it_came(mesh: LakeMesh) -> None:
    """Every record, duplicates and nonsense included; its event time may be nonsense too."""
    frame = pl.DataFrame(
        {
            "event_id": ["a", "a", "b"],
            "tenant_id": ["t", "t", ""],
            "occurred_at": instants([START_US, START_US, -1]),
            "model": ["m"] * 3,
            "version": pl.Series([None] * 3, dtype=pl.Int32),
            "entities": [[{"name": "tail", "value": "N1"}]] * 3,
            "inputs": [[{"name": "hour", "value": 1.0}]] * 3,
            "mode": ["live"] * 3,
            "expires_at": pl.Series([None] * 3, dtype=pl.Datetime("us", "UTC")),
        }
    )
    await mesh.append(mesh.catalogue.topic(REQUESTS), frame, 1)
    await mesh.lay(REQUESTS, [b"nonsense"], 1)
    await mesh.write_all()
    rows = mesh.lake().select(RAW).lazy().sort("_position").collect()
    assert rows["value"].to_list() == mesh.bus.log(REQUESTS, 1).values
    assert rows["key"].to_list() == [b"k"] * 4
    assert rows["tenant_id"].to_list() == ["t", "t", "", "-"]
    assert rows["schema_id"].to_list()[3] is None
    assert rows["occurred_at"].to_list()[0] == datetime(2013, 1, 1, tzinfo=UTC)
    assert rows["reason"].is_null().to_list() == [True, True, True, False]


async def test_a_new_field_becomes_a_column_with_its_first_record(mesh: LakeMesh) -> None:
    """Written by a producer whose catalogue is newer than the writer's."""
    await mesh.predict(0, 4)
    await mesh.write_all()
    old = mesh.catalogue.topic(PREDICTIONS)
    more = {"name": "explanation", "type": ["null", "string"], "default": None}
    newer = replace(old, record={**old.record, "fields": [*old.record["fields"], more]})
    topics = {**mesh.catalogue.topics, PREDICTIONS: newer}
    mesh.catalogue, writers = replace(mesh.catalogue, topics=topics), mesh.catalogue
    await mesh.predict(4, 4, explanation="because")
    mesh.catalogue = writers
    await mesh.write_all()
    await mesh.predict(8, 2)  # an old producer goes on
    await mesh.write_all()
    rows = mesh.lake().select(DECODED).lazy().sort("_position").collect()
    assert rows["explanation"].to_list() == [None] * 4 + ["because"] * 4 + [None] * 2


async def test_a_table_declared_later_is_filled_from_the_start_and_doubles_nothing(
    tmp_path: Path,
) -> None:
    mesh = LakeMesh(tmp_path, curated=())
    await mesh.predict(0, 20)
    await mesh.write_all()
    mesh = with_log_of(mesh, LakeMesh(tmp_path))
    await mesh.write_all()
    assert len(mesh.rows("curated.predictions")) == 16
    assert mesh.rows(DECODED) == mesh.logged(PREDICTIONS)


def with_log_of(old: LakeMesh, new: LakeMesh) -> LakeMesh:
    new.bus, new.registry = old.bus, old.registry
    return new


async def test_a_row_that_an_expression_can_not_take_goes_aside_from_that_table_alone(
    tmp_path: Path,
) -> None:
    strict = replace(CURATED, columns={"n": "CAST(substr(request_id, 2) AS INT)"})
    mesh = LakeMesh(tmp_path, curated=[strict])
    await mesh.predict(1, 4)
    await mesh.predict(6, 1, request_id="rX")
    await mesh.write_all()
    assert mesh.rows(DECODED) == mesh.logged(PREDICTIONS)
    assert len(mesh.rows("curated.predictions")) == 4
    (reason,) = mesh.lake().select(ASIDE).lazy().collect()["reason"].to_list()
    assert reason.startswith("curated.predictions: ")


async def test_a_column_that_changed_its_type_is_refused(tmp_path: Path) -> None:
    mesh = LakeMesh(tmp_path)
    await mesh.predict(1, 4)
    await mesh.write_all()
    other = with_log_of(
        mesh, LakeMesh(tmp_path, curated=[replace(CURATED, columns={"likely": "request_id"})])
    )
    with pytest.raises(Misdeclared, match="keeps the type of its columns"):
        await other.write_all()


async def test_progress_is_told_by_every_snapshot(mesh: LakeMesh) -> None:
    await mesh.predict(0, 3)
    await mesh.write_all()
    snapshot = mesh.lake().table(DECODED).current_snapshot()
    assert snapshot is not None
    assert snapshot.summary is not None
    told: dict[str, Any] = dict(snapshot.summary.additional_properties)
    assert json.loads(told["causemesh.partition.0"]) == [1, 2, [["tasks", 0, 2, 0]], []]


async def test_a_table_without_any_progress_left_is_refused(mesh: LakeMesh) -> None:
    """Guessing a position would lose or double records."""
    await mesh.predict(0, 3)
    await mesh.write_all()
    table = mesh.lake().table(DECODED)
    table.append(table.scan().to_arrow().slice(0, 0))  # as another tool commits
    assert mesh.lake().progress(DECODED).of(0).position == 2
    old = [one.snapshot_id for one in table.snapshots()[:-1]]
    table.maintenance.expire_snapshots().by_ids(old).commit()
    with pytest.raises(Fatal, match="says how far it holds its topic"):
        await mesh.store().claim(mesh.group, 0)


async def test_a_unit_that_was_left_without_a_commit_leaves_nothing(mesh: LakeMesh) -> None:
    await mesh.predict(0, 3)
    store = mesh.store()
    claim, _ = await store.claim(mesh.group, 0)
    async with store.unit(claim) as unit:
        unit.transaction.append((DECODED, pl.DataFrame()))
    async with store.unit(claim) as unit:
        await unit.commit(Checkpoint({(PREDICTIONS, 0): 2}))
    await store.flush()
    assert mesh.rows(DECODED) == []
    assert mesh.lake().progress(DECODED).of(0).position == 2
