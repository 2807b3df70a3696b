"""The replay against the source, read a second time in the plainest way."""

from __future__ import annotations

import csv
import io
import zipfile
from collections import Counter
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from causemesh.catalogue import Catalogue
from causemesh.codec.columns import frame_schema
from causemesh.codec.encode import Encoder
from causemesh.errors import Misdeclared
from examples.flights import dataset, raw
from examples.flights.dataset import Defects, Replay, load, slices, with_defects

PROJECT = Path(dataset.__file__).parent
HOUR_US = 3_600_000_000
UTC = ZoneInfo("UTC")
Row = dict[str, Any]


@pytest.fixture(scope="module")
def replay() -> Replay:
    return load(3)


@pytest.fixture(scope="module")
def recorded() -> dict[str, Row]:
    """The source's rows of three months, by flight id."""
    with zipfile.ZipFile(raw._folder() / "flights.csv.zip") as archive:
        text = io.TextIOWrapper(io.BytesIO(archive.read("flights.csv")))
    rows = [row for row in csv.DictReader(text) if int(row["month"]) <= 3]
    return {flight_id(row): row for row in rows}


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    return Catalogue.load([PROJECT])


def flight_id(row: Row) -> str:
    date = f"2013{int(row['month']):02}{int(row['day']):02}"
    return f"{row['carrier']}{row['flight']}-{date}-{row['origin']}"


def known(rows: dict[str, Row], column: str) -> int:
    return sum(row[column] not in ("", "NA") for row in rows.values())


def test_counts_are_those_of_the_source(replay: Replay, recorded: dict[str, Row]) -> None:
    assert len(recorded) == replay.requests.height == 80_789
    assert replay.departed.height == known(recorded, "dep_delay") < len(recorded)
    assert replay.landed.height == known(recorded, "arr_delay") < replay.departed.height
    assert set(replay.requests["event_id"]) == set(recorded)


def test_ids_are_unique_all_year() -> None:
    year = load(12)
    assert year.requests.height == 336_776
    for frame in year.frames.values():
        assert frame["event_id"].is_unique().all()
        assert frame["occurred_at"].is_sorted()
    assert year.weather.height == 26_115


def test_loading_twice_gives_the_same(replay: Replay) -> None:
    for kind, frame in load(3).frames.items():
        assert_frame_equal(frame, replay.frames[kind])


@pytest.mark.parametrize("months", [0, 13])
def test_other_months_are_refused(months: int) -> None:
    with pytest.raises(Misdeclared, match="1 to 12"):
        load(months)


def test_moments_of_a_flight(replay: Replay) -> None:
    """UA1545 on New Year's Day: scheduled 5:15, left 5:17, at the gate in Houston 8:30."""
    chosen = pl.col("flight_id") == "UA1545-20130101-EWR"
    departed = replay.departed.row(by_predicate=chosen, named=True)
    landed = replay.landed.row(by_predicate=chosen, named=True)
    request = replay.requests.row(
        by_predicate=pl.col("event_id") == "UA1545-20130101-EWR", named=True
    )
    assert departed["scheduled_at"] == datetime(2013, 1, 1, 10, 15, tzinfo=UTC)
    assert departed["occurred_at"] == datetime(2013, 1, 1, 10, 17, tzinfo=UTC)
    assert landed["occurred_at"] == datetime(2013, 1, 1, 14, 30, tzinfo=UTC)
    assert request["occurred_at"] == datetime(2013, 1, 1, 9, 45, tzinfo=UTC)
    assert (departed["event_id"], landed["event_id"]) == (
        "dep-UA1545-20130101-EWR",
        "arr-UA1545-20130101-EWR",
    )
    assert (departed["departure_delay_minutes"], landed["arrival_delay_minutes"]) == (2, 11)
    assert departed["tenant_id"] == departed["carrier"] == request["tenant_id"] == "UA"


def test_departures_show_the_clock_of_new_york(replay: Replay, recorded: dict[str, Row]) -> None:
    """Also on the days around 10 March, when it is put forward."""
    local = replay.departed.select(
        "flight_id", at=pl.col("occurred_at").dt.convert_time_zone("America/New_York")
    ).with_columns(clock=pl.col("at").dt.strftime("%H%M").cast(pl.Int32))
    for name, clock in local.select("flight_id", "clock").iter_rows():
        assert clock == int(float(recorded[name]["dep_time"])) % 2400
    offsets = local.select(pl.col("at").dt.base_utc_offset() + pl.col("at").dt.dst_offset())
    assert set(offsets.to_series()) == {timedelta(hours=-5), timedelta(hours=-4)}


def test_arrivals_show_the_clock_of_their_destination(
    replay: Replay, recorded: dict[str, Row]
) -> None:
    """At the gate, soon after touchdown, and as late as recorded; across midnight too."""
    with (raw._folder() / "airports.csv").open() as file:
        zones = {row["faa"]: row["tzone"] for row in csv.DictReader(file)}
    departed = dict(replay.departed.select("flight_id", "occurred_at").iter_rows())
    next_day = 0
    for name, arrived in replay.landed.select("flight_id", "occurred_at")[::20].iter_rows():
        row = recorded[name]
        zone = ZoneInfo(zones.get(row["dest"], "America/Puerto_Rico"))
        assert clock_of(arrived, zone) == int(float(row["arr_time"])) % 2400
        due = arrived - timedelta(minutes=float(row["arr_delay"]))
        assert clock_of(due, zone) == int(float(row["sched_arr_time"])) % 2400
        taxied = arrived - departed[name] - timedelta(minutes=float(row["air_time"]))
        assert timedelta(0) < taxied < timedelta(hours=4)
        next_day += arrived.astimezone(zone).day != int(row["day"])
    assert next_day > 50


def clock_of(moment: datetime, zone: ZoneInfo) -> int:
    return int(moment.astimezone(zone).strftime("%H%M"))


def test_requests_come_first_and_carry_their_inputs(
    replay: Replay, recorded: dict[str, Row]
) -> None:
    for row in replay.requests[::500].iter_rows(named=True):
        source = recorded[row["event_id"]]
        entities = {pair["name"]: pair["value"] for pair in row["entities"]}
        inputs = {pair["name"]: pair["value"] for pair in row["inputs"]}
        date = datetime(2013, int(source["month"]), int(source["day"]))
        assert list(entities) == ["tail", "origin", "dest", "carrier"]
        assert [entities[name] for name in ("origin", "dest", "carrier")] == [
            source[name] for name in ("origin", "dest", "carrier")
        ]
        assert inputs["departure_hour"] == int(source["hour"]) + int(source["minute"]) / 60
        assert inputs["weekday"] == date.isoweekday()
        assert inputs["distance_miles"] == float(source["distance"])
        assert (row["model"], row["version"], row["mode"]) == ("late-arrival", None, "replay")


def test_a_flight_without_a_plane_is_routed_by_its_own_id(
    replay: Replay, recorded: dict[str, Row]
) -> None:
    key = pl.col("entities").list.first().struct.field("value")
    keys = dict(replay.requests.select("event_id", key.alias("key")).iter_rows())
    without = [name for name, row in recorded.items() if row["tailnum"] in ("", "NA")]
    assert len(without) > 100
    assert all(keys[name] == name for name in without)
    assert all(keys[name] == recorded[name]["tailnum"] for name in keys.keys() - set(without))


def test_every_frame_fits_its_topic(replay: Replay, catalogue: Catalogue) -> None:
    for kind, frame in replay.frames.items():
        record = catalogue.topic(f"inbox.{kind}").record
        assert frame.schema == frame_schema(record)
        assert len(Encoder(record, 1).encode(frame[:50])) == 50


def test_the_replay_brings_its_own_watermarks(catalogue: Catalogue) -> None:
    kinds = catalogue.event_types
    assert {name: kind.key for name, kind in kinds.items()} == {
        "flight_departed": "flight_id",
        "flight_landed": "flight_id",
        "weather_observed": "origin",
    }
    progress = [catalogue.requests, *(kind.progress for kind in kinds.values())]
    assert {promise.watermark for promise in progress} == {"source"}


@pytest.mark.parametrize("hours", [6, 24 * 7])
def test_slices_part_the_replay_in_time(replay: Replay, hours: int) -> None:
    step, before = hours * HOUR_US, None
    parts: dict[str, list[pl.DataFrame]] = {kind: [] for kind in replay.frames}
    for until_us, frames in slices(replay, hours):
        assert before in (None, until_us - step)
        assert until_us % step == 0
        for kind, frame in frames.items():
            parts[kind].append(frame)
            at = frame["occurred_at"].to_physical()
            assert at.is_between(until_us - step, until_us, closed="left").all()
        before = until_us
    for kind, frame in replay.frames.items():
        assert_frame_equal(pl.concat(parts[kind]), frame)


def test_a_row_on_the_edge_belongs_to_the_next_slice(replay: Replay) -> None:
    edge = replay.weather.filter(pl.col("occurred_at") == datetime(2013, 1, 1, 12, tzinfo=UTC))
    assert edge.height == 3
    (_, first), (_, second), *_ = slices(replay)
    assert set(edge["event_id"]).isdisjoint(first["weather_observed"]["event_id"])
    assert set(edge["event_id"]) <= set(second["weather_observed"]["event_id"])


def test_slices_of_nothing_are_refused(replay: Replay) -> None:
    with pytest.raises(Misdeclared, match="at least an hour"):
        next(slices(replay, 0))


def test_defects_are_counted_exactly(replay: Replay) -> None:
    spoiled, defects = with_defects(replay.departed)
    times = Counter(spoiled["event_id"])
    nameless = spoiled.filter(pl.col("tenant_id") == "")
    twice = {name for name, count in times.items() if count == 2}
    assert defects == Defects(len(twice), nameless.height)
    assert defects == Defects(replay.departed.height // 2_000, replay.departed.height // 5_000)
    assert spoiled.height == replay.departed.height + defects.duplicates
    assert max(times.values()) == 2
    assert twice.isdisjoint(nameless["event_id"])
    assert spoiled["occurred_at"].is_sorted()
    assert_frame_equal(with_defects(replay.departed)[0], spoiled)
    assert replay.departed["event_id"].is_unique().all()
    assert not (replay.departed["tenant_id"] == "").any()


def test_few_rows_have_no_defects(replay: Replay) -> None:
    spoiled, defects = with_defects(replay.departed[:1_999])
    assert defects == Defects(0, 0)
    assert_frame_equal(spoiled, replay.departed[:1_999])
