"""Upkeep of a table: few large files, no days past their time, few snapshots, no orphans.

Each step is a commit like the writer's own: on the newest snapshot, carrying its progress on. None
of them changes what a reader finds, but retention, which takes whole days out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import polars as pl
import pyarrow.fs as pafs
from pyiceberg.catalog import Catalog
from pyiceberg.exceptions import CommitFailedException
from pyiceberg.io.pyarrow import ArrowScan, PyArrowFileIO
from pyiceberg.manifest import DataFile
from pyiceberg.table import FileScanTask, Table

from causemesh.errors import Fatal
from causemesh.faultpoints import Point, reach
from causemesh.lake.commits import Change, commit
from causemesh.lake.definitions import TableDefinition
from causemesh.lake.opening import away
from causemesh.lake.progress import TableProgress, progress_in
from causemesh.lake.tables import write

_DAY_US = 86_400_000_000
_TOGETHER = 200  # files rewritten in one commit
Told = Callable[[str], None]


@dataclass(frozen=True)
class UpkeepLimits:
    """When files are small, how many of one tenant and day are too many, how long snapshots stay
    to be read, and how old a file without a snapshot must be to count as an orphan.

    `orphan_s` must be longer than any process may be paused between a file and its commit; one that
    was paused longer writes its files anew.
    """

    small_bytes: int = 32 << 20
    small_files: int = 4
    target_bytes: int = 256 << 20
    snapshot_s: float = 3 * 86_400.0
    snapshots: int = 10
    orphan_s: float = 86_400.0


@dataclass(frozen=True)
class Compacted:
    """Files before and after, and how many tenant-days they were of."""

    partitions: int = 0
    files_before: int = 0
    files_after: int = 0


def compact(
    catalog: Catalog, identifier: str, limits: UpkeepLimits, told: Told = lambda text: None
) -> Compacted:
    """Rewrite the small files of each tenant and day as one, a few at a time.

    Another commit in between is no matter, unless it took some of the files out; those are left.
    """
    done = Compacted()
    for group in _groups(catalog, identifier, limits):
        before = [task.file for tasks in group for task in tasks]
        began_us = time.time_ns() // 1000
        after = _rewritten(catalog, identifier, group)
        reach(Point.LAKE_COMPACTED)
        if _replace(catalog, identifier, before, after, began_us):
            done = Compacted(
                done.partitions + len(group),
                done.files_before + len(before),
                done.files_after + len(after),
            )
            told(f"{done.partitions} tenant-days: {done.files_before} files -> {done.files_after}")
    return done


def _groups(
    catalog: Catalog, identifier: str, limits: UpkeepLimits
) -> Iterator[list[list[FileScanTask]]]:
    """Lists of tenant-days, each the list of its small files."""
    with away():
        tasks = list(catalog.load_table(identifier).scan().plan_files())
    small: dict[str, list[FileScanTask]] = {}
    for task in tasks:
        if task.file.file_size_in_bytes < limits.small_bytes:
            small.setdefault(repr(task.file.partition), []).append(task)
    group: list[list[FileScanTask]] = []
    for files in small.values():
        if len(files) < limits.small_files:
            continue
        group.append(files)
        if sum(map(len, group)) >= _TOGETHER:
            yield group
            group = []
    if group:
        yield group


def _rewritten(
    catalog: Catalog, identifier: str, group: Sequence[Sequence[FileScanTask]]
) -> list[DataFile]:
    """New files with the rows of old ones, in log order. Raises Fatal when the counts differ."""
    with away():
        table = catalog.load_table(identifier)
        after: list[DataFile] = []
        for tasks in group:
            scan = ArrowScan(table.metadata, table.io, table.schema(), table.scan().row_filter)
            rows = pl.from_arrow(scan.to_table(tasks))
            assert isinstance(rows, pl.DataFrame)
            made = write(table, rows.sort("_partition", "_position", maintain_order=True))
            held = sum(task.file.record_count for task in tasks)
            if sum(one.record_count for one in made) != held:
                raise Fatal(f"{identifier}: a rewrite of {held} rows came to another number")
            after += made
    return after


def _replace(
    catalog: Catalog,
    identifier: str,
    before: Sequence[DataFile],
    after: Sequence[DataFile],
    began_us: int,
) -> bool:
    """Put new files in the place of old ones; False when one of either is no longer there."""
    replaced = False

    def decide(table: Table, progress: TableProgress) -> Change | None:
        nonlocal replaced
        live = {task.file.file_path for task in table.scan().plan_files()}
        replaced = all(one.file_path in live for one in before)
        replaced = replaced and not progress.may_have_swept(began_us)
        return Change(progress, after, before) if replaced else None

    commit(catalog, identifier, decide)
    return replaced


def retain(catalog: Catalog, definition: TableDefinition) -> int:
    """Take out the days before the table's horizon; returns how many records went.

    Time is event time: the horizon lies the retention's days before the watermark up to which the
    table is whole, or before its newest day when no watermarks travel on its topic. A replay of an
    old year keeps its year.
    """
    gone = 0

    def decide(table: Table, progress: TableProgress) -> Change | None:
        nonlocal gone
        files = [task.file for task in table.scan().plan_files()]
        first = horizon(files, progress, definition.retention_days)
        old = [one for one in files if one.partition[1] < first]
        gone = sum(one.record_count for one in old)
        return Change(progress, (), old) if old else None

    commit(catalog, definition.identifier, decide)
    return gone


def horizon(files: Sequence[DataFile], progress: TableProgress, days: int) -> int:
    """The first day (since 1970) that `retain` leaves."""
    newest = max((int(one.partition[1]) for one in files), default=0)
    whole_us = progress.watermark_us()
    reached = newest if whole_us is None else min(newest, whole_us // _DAY_US)
    return reached - days


def expire(catalog: Catalog, identifier: str, limits: UpkeepLimits) -> int:
    """Forget snapshots that are older than their time, never the newest ones; returns how many.

    The newest snapshot is made to tell its progress first, if another tool committed it.
    """
    before = datetime.now(UTC).timestamp() - limits.snapshot_s
    while True:
        with away():
            table = catalog.load_table(identifier)
            now = table.current_snapshot()
            if now is None:
                return 0
            if progress_in(now) is None:
                table = commit(catalog, identifier, lambda _, progress: Change(progress))
            ordered = sorted(table.snapshots(), key=lambda one: one.timestamp_ms)
            kept = {
                ref.snapshot_id for ref in table.metadata.refs.values()
            }  # also after a rollback
            old = [
                one.snapshot_id
                for one in ordered[: -limits.snapshots]
                if one.timestamp_ms < before * 1000 and one.snapshot_id not in kept
            ]
            if not old:
                return 0
            try:
                table.maintenance.expire_snapshots().by_ids(old).commit()
            except CommitFailedException:
                continue
            return len(old)


def sweep(catalog: Catalog, identifier: str, limits: UpkeepLimits) -> int:
    """Remove files that no snapshot names and that are old enough; returns how many.

    The cutoff is committed first: a writer that was paused since before it finds that its files may
    be gone, and writes them again.
    """
    cutoff_us = round((datetime.now(UTC).timestamp() - limits.orphan_s) * 1e6)
    with away():
        if not list(_orphans(catalog.load_table(identifier), cutoff_us)):
            return 0

    def decide(table: Table, progress: TableProgress) -> Change:
        return Change(replace(progress, swept_us=max(cutoff_us, progress.swept_us)))

    table = commit(catalog, identifier, decide)
    reach(Point.LAKE_SWEEPING)
    gone = 0
    with away():
        for path in list(_orphans(table, cutoff_us)):
            table.io.delete(path)
            gone += 1
    return gone


def _orphans(table: Table, cutoff_us: int) -> Iterator[str]:
    """Files under a table's location, older than the cutoff, that nothing names."""
    io = table.io
    assert isinstance(io, PyArrowFileIO)
    scheme, netloc, base = PyArrowFileIO.parse_location(table.location(), io.properties)
    named = {PyArrowFileIO.parse_location(path, io.properties)[2] for path in _named(table)}
    selector = pafs.FileSelector(base, recursive=True, allow_not_found=True)
    for found in io.fs_by_scheme(scheme, netloc).get_file_info(selector):
        old = found.mtime_ns is not None and found.mtime_ns // 1000 < cutoff_us
        if found.type == pafs.FileType.File and old and found.path not in named:
            start = table.location().index(base) if base in table.location() else 0
            yield table.location()[:start] + found.path


def _named(table: Table) -> Iterator[str]:
    """Every file that the table's metadata leads to."""
    yield table.metadata_location
    yield from (one.metadata_file for one in table.metadata.metadata_log)
    yield from (one.statistics_path for one in table.metadata.statistics)
    seen: set[str] = set()
    for snapshot in table.snapshots():
        yield snapshot.manifest_list
        for manifest in snapshot.manifests(table.io):
            if manifest.manifest_path in seen:
                continue
            seen.add(manifest.manifest_path)
            yield manifest.manifest_path
            for entry in manifest.fetch_manifest_entry(table.io, discard_deleted=True):
                yield entry.data_file.file_path
