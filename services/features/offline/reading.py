"""Events of views out of the lake: the columns they read, the days they need, who is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import polars as pl

from causemesh.catalogue import Catalogue, Topic
from causemesh.codec.columns import frame_schema
from causemesh.errors import Misdeclared
from causemesh.lake.opening import away
from causemesh.lake.progress import progress_of
from causemesh.lake.reading import Lake, Selection
from services.features.domain.corrections import reach_us
from services.features.domain.definitions import FeatureView
from services.features.domain.events import ViewEvents, event_columns, readable_events
from services.features.lateness import LATE
from services.features.offline.corrections import takes_corrections
from services.features.plan import LAKE_PLACE, as_decoded, lake_frame
from services.features.seen import COLUMNS, Seen, late_events, seen

Told = Callable[[str], None]
"""Hears of progress."""
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_TOGETHER = 1_000_000


@dataclass(frozen=True)
class TableRead:
    """A table that was read: its topic, at which snapshot, how many records were looked at, and
    before which event time (microseconds) it held all of them; None where nobody promised."""

    topic: str
    snapshot_id: int | None
    records: int
    whole_before_us: int | None


@dataclass(frozen=True)
class Wanted:
    """One view's events for some entities (`keys`), for answers as of `first_us` to `last_us`."""

    view: FeatureView
    keys: pl.Series
    first_us: int
    last_us: int

    @property
    def since_us(self) -> int | None:
        """The earliest event that an answer may depend on; None where any may."""
        view = self.view
        if view.retention_us is None and any(one.window is None for one in view.features):
            return None
        # a correction may have occurred before the event that it is of
        return self.first_us - (2 if takes_corrections(view) else 1) * reach_us(view)

    def of(self, events: ViewEvents) -> ViewEvents:
        """The events of the entities asked for; where the view takes corrections, all of them, as
        a correction may come of any entity."""
        if takes_corrections(self.view):
            return events
        keys = self.keys.alias("entity").to_frame()
        rows = events.entity.alias("entity").to_frame().with_row_index("row")
        kept = rows.join(keys, on="entity", how="semi", maintain_order="left")["row"]
        return events.take(kept.cast(pl.Int64).to_numpy())


@dataclass
class LakeEvents:
    """Reads events; `tables` is what was read, by identifier."""

    lake: Lake
    catalogue: Catalogue
    told: Told = lambda text: None
    tables: dict[str, TableRead] = field(default_factory=dict)

    def read(self, wanted: Sequence[Wanted]) -> Iterator[tuple[FeatureView, Seen]]:
        """The events that the stream took of each view, one event type after the other.

        Raises Misdeclared when the lake does not hold an event type, or not yet whole.
        """
        late = self._late(wanted)
        for event_type in dict.fromkeys(one.view.event_type for one in wanted):
            mine = [one for one in wanted if one.view.event_type == event_type]
            for one, events in zip(mine, self._of_type(event_type, mine), strict=True):
                yield one.view, seen(one.view, events, late_events(one.view, late))

    def _of_type(self, event_type: str, wanted: Sequence[Wanted]) -> list[ViewEvents]:
        topic = self.catalogue.topic(f"events.{event_type}")
        columns = _columns([one.view for one in wanted], topic)
        found = [[ViewEvents.none(one.view)] for one in wanted]
        for rows in self._frames(topic.name, [*columns, *LAKE_PLACE], wanted):
            events = lake_frame(topic, rows, columns)
            for parts, one in zip(found, wanted, strict=True):
                seen, _ = readable_events(one.view, events)  # what it can't take it never had
                parts.append(one.of(seen))
        return [ViewEvents.concatenate(parts) for parts in found]

    def _frames(
        self, topic: str, columns: Sequence[str], wanted: Sequence[Wanted]
    ) -> Iterator[pl.DataFrame]:
        """The records of a topic that may count, some days at a time."""
        since, until = _reach(wanted)
        there = {one.name for one in self.lake.table(topic).schema().fields}
        known = [name for name in columns if name in there]
        chosen = self.lake.select(topic, since=since, until=until, columns=known)
        records = 0
        for part in _parts(chosen):
            with away():
                frame = part.lazy().collect()
            records += frame.height
            self.told(f"{topic}: {records:,} records read")
            yield frame
        identifier = self.lake.definition.table(topic).identifier
        whole_us = progress_of(chosen.table.metadata).watermark_us()
        self.tables[identifier] = TableRead(topic, chosen.snapshot_id, records, whole_us)

    def _late(self, wanted: Sequence[Wanted]) -> pl.DataFrame:
        """The records of what came late for any of the views."""
        topic = self.catalogue.topic(LATE)
        identifier = self.lake.definition.table(LATE).identifier
        if identifier not in {one.identifier for one, _ in self.lake.tables()}:
            schema = frame_schema(topic.record)
            return pl.DataFrame(schema={name: schema[name] for name in COLUMNS})
        since, until = _reach(wanted)
        # a table that nobody has written to since lacks what records have gained
        there = {one.name for one in self.lake.table(LATE).schema().fields}
        known = [name for name in COLUMNS if name in there]
        chosen = self.lake.select(LATE, since=since, until=until, columns=known)
        named = pl.col("view").is_in([one.view.id for one in wanted])
        with away():
            found = chosen.lazy().filter(named).collect()
        self.tables[identifier] = TableRead(LATE, chosen.snapshot_id, found.height, None)
        return pl.DataFrame(as_decoded(topic, found, COLUMNS))


def check_whole(tables: Mapping[str, TableRead], last_us: int) -> None:
    """Raises Misdeclared unless the tables of events hold all that occurred before `last_us`."""
    for name, table in tables.items():
        whole_us = table.whole_before_us
        if table.topic != LATE and (whole_us is None or whole_us < last_us):
            held = "no time yet" if whole_us is None else f"{instant(whole_us)}"
            raise Misdeclared(
                f"{name} is whole before {held}, but a request is as of {instant(last_us)}: its"
                " events may still come; leave such requests out or wait (causemesh lake tables)"
            )


def _reach(wanted: Sequence[Wanted]) -> tuple[datetime | None, datetime | None]:
    """The event time that any of these depends on."""
    since = [one.since_us for one in wanted]
    first_us = None if None in since else min(at_us for at_us in since if at_us is not None)
    return instant(first_us), instant(max(one.last_us for one in wanted))


def _parts(chosen: Selection) -> Iterator[Selection]:
    """The same selection in runs of days, each of about as many records."""
    if chosen.snapshot_id is None:
        return
    records: dict[int, int] = {}
    # all files, for a plan with a filter works each file's out anew and takes thirty times as long
    with away():
        for task in chosen.table.scan(snapshot_id=chosen.snapshot_id).plan_files():
            day = task.file.partition[1]
            records[day] = records.get(day, 0) + task.file.record_count
    first = -(2**62) if chosen.since is None else (chosen.since - _EPOCH).days
    end = 2**62 if chosen.until is None else (chosen.until - _EPOCH).days
    inside = {day: count for day, count in records.items() if first <= day <= end}
    bounds = [chosen.since, *_cuts(inside), chosen.until]
    for since, until in pairwise(bounds):
        yield replace(chosen, since=since, until=until)


def _cuts(records: Mapping[int, int]) -> list[datetime]:
    """Days to cut at; `records` are by day since 1970."""
    cuts: list[datetime] = []
    held = 0
    for day, count in sorted(records.items()):
        if held and held + count > _TOGETHER:
            cuts.append(_EPOCH + timedelta(days=day))
            held = 0
        held += count
    return cuts


def _columns(views: Iterable[FeatureView], topic: Topic) -> list[str]:
    """What the views read of an event. Raises Misdeclared for what it does not have."""
    known = {field["name"] for field in topic.record["fields"]}
    names: dict[str, None] = {}
    for view in views:
        unknown = [name for name in event_columns(view) if name not in known]
        if unknown:
            raise Misdeclared(f"view {view.name!r}: {view.event_type} has no column {unknown[0]!r}")
        names |= dict.fromkeys(event_columns(view))
    return list(names)


def instant(at_us: int | None) -> datetime | None:
    """A time in microseconds as a date; None for what no date can tell."""
    try:
        return None if at_us is None else _EPOCH + timedelta(microseconds=at_us)
    except OverflowError:
        return None
