"""Training sets out of a lake: the vectors of the stream, said where they come from."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

from causemesh.bus.base import RawBatch
from causemesh.errors import Misdeclared
from causemesh.runner import Batch
from examples.flights import offline as flights_offline
from examples.flights.dataset import load
from examples.flights.model import FEATURES
from services.features.domain.late import Behind
from services.features.domain.parsing import parse_views
from services.features.domain.state import PartitionState
from services.features.domain.transforms import Transforms, parse_transforms
from services.features.lateness import LATE, Late, late_records
from services.features.offline.commands import app
from services.features.offline.definitions import Definitions
from services.features.offline.logged import (
    PREDICTIONS,
    REQUESTS,
    VERSIONS,
    Logged,
    logged_training_set,
)
from services.features.offline.sets import about
from services.features.offline.training import training_set
from tests.unit.features.lakes import fill, lake_of, matrix_of, settings_of

ROOT = Path(__file__).parents[3]
FLIGHTS = ROOT / "examples" / "flights"
START = datetime(2020, 1, 1, tzinfo=UTC)
SENSORS = {
    "views": {
        "sensors": {
            "event": "reading",
            "entity": "sensor",
            "lateness": 0,
            "features": {"*": ["count 1h"], "value": ["mean 1h", "max 1h", "latest"]},
            "tile": "5m",
            "retention": "1d",
        },
        "moved": {
            "event": "reading",
            "entity": "site",
            "placement": "rekeyed",
            "filter": "value < 100",
            "columns": {"small": "value / 1000000000000"},
            "features": {"small": ["sum 1h"]},
            "tile": "5m",
        },
    },
    "on_demand": {"made": {"per_reading": "sensors.value_max_1h / sensors.count_1h + input.more"}},
}


def definitions_of(document: dict[str, Any]) -> Definitions:
    views = tuple(parse_views(document))
    known = [f"{view.name}.{one.name}" for view in views for one in view.features]
    made: Transforms = parse_transforms(document, known)
    return Definitions(Definitions.of(ROOT / "tests" / "project").catalogue, views, made)


def readings(values: Sequence[float | None], minutes: Sequence[int]) -> pl.DataFrame:
    count = len(values)
    return pl.DataFrame(
        {
            "event_id": [f"e{n}" for n in range(count)],
            "tenant_id": ["t"] * count,
            "occurred_at": [START + timedelta(minutes=at) for at in minutes],
            "sensor": ["s"] * count,
            "site": ["x"] * count,
            "value": values,
        }
    )


def asked(minutes: Sequence[float], **more: Any) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "tenant_id": ["t"] * len(minutes),
            "sensor": ["s"] * len(minutes),
            "site": ["x"] * len(minutes),
            "occurred_at": [START + timedelta(minutes=at) for at in minutes],
            **{name: [value] * len(minutes) for name, value in more.items()},
        }
    )


@pytest.fixture(scope="module")
def flights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The lake of the flights' first three days."""
    folder = tmp_path_factory.mktemp("lake")
    definitions, replay = Definitions.of(FLIGHTS), load(1, 3)
    frames = {f"events.{kind}": f for kind, f in replay.frames.items() if kind != "requests"}
    fill(folder, definitions.catalogue, frames)
    return folder


def flight_requests() -> pl.DataFrame:
    """The requests of the replay with their entities and inputs as columns, and a label."""
    unpacked = flights_offline._unpacked(load(1, 3).requests)
    inputs = {f"input.{n.removeprefix('input.')}": n for n in FEATURES if n.startswith("input.")}
    columns = ["event_id", "tenant_id", "occurred_at", "tail", "origin", "dest", "carrier"]
    return unpacked.select(*columns, *inputs.values()).with_columns(label=pl.int_range(pl.len()))


@pytest.mark.parametrize("together", [1_000_000, 700])
def test_a_training_set_has_the_bits_of_the_stream(
    flights: Path, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many days are read at once."""
    monkeypatch.setattr("services.features.offline.reading._TOGETHER", together)
    definitions = Definitions.of(FLIGHTS)
    streamed = flights_offline.logged_vectors(load(1, 3))
    requests = flight_requests().sample(fraction=1.0, shuffle=True, seed=3)
    names = [name for name in FEATURES if not name.startswith("input.")]
    told: list[str] = []
    with lake_of(flights, definitions.catalogue) as lake:
        made = training_set(requests, names, lake, definitions, told=told.append)
    assert made.frame.select(requests.columns).equals(requests)  # labels left alone, order kept
    assert made.frame.columns[len(requests.columns) :] == ["features_as_of", *names]
    ordered = streamed.select(event_id="request_id").join(
        made.frame, on="event_id", maintain_order="left"
    )
    wanted = streamed["vector"].to_numpy()[:, [FEATURES.index(name) for name in names]]
    assert matrix_of(ordered, names).tobytes() == np.ascontiguousarray(wanted).tobytes()
    assert (~np.isnan(wanted)).mean() > 0.5
    steps = [text for text in told if text.startswith("events.flight_landed")]
    assert len(steps) == (1 if together > 700 else 3)
    assert set(made.about["views"]) == {view.id for view in definitions.views}


def test_a_file_says_what_it_was_made_from(flights: Path, tmp_path: Path) -> None:
    definitions = Definitions.of(FLIGHTS)
    with lake_of(flights, definitions.catalogue) as lake:
        made = training_set(flight_requests().head(300), ["dest_arrivals"], lake, definitions)
        table = lake.table("flight_landed").current_snapshot()
    assert table is not None
    made.write(tmp_path / "x.parquet")
    told = about(tmp_path / "x.parquet")
    view = definitions.view("dest_arrivals@v1")
    assert told["views"] == {view.id: view.fingerprint}
    assert told["lake"]["decoded.events_flight_landed"]["snapshot_id"] == table.snapshot_id
    assert (told["rows"], told["slice_seconds"]) == (300, 60.0)
    # the first hours of the first day: later days were not read
    assert 0 < told["lake"]["decoded.events_flight_landed"]["records"] < 498
    assert datetime.fromisoformat(told["made_at"]).tzinfo is not None
    assert pl.read_parquet(tmp_path / "x.parquet").equals(made.frame)
    made.frame.write_parquet(tmp_path / "plain.parquet")
    with pytest.raises(Misdeclared, match="is no training set"):
        about(tmp_path / "plain.parquet")


def test_the_command_joins_and_describes(
    flights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = settings_of(flights)
    monkeypatch.setenv("CAUSEMESH_LAKE_CATALOG", told.catalog)
    monkeypatch.setenv("CAUSEMESH_LAKE_WAREHOUSE", told.warehouse)
    monkeypatch.setenv("CAUSEMESH_PROJECT", str(FLIGHTS))
    flight_requests().head(20).write_parquet(tmp_path / "rows.parquet")
    out = tmp_path / "x.parquet"

    def run(*words: str) -> Any:
        return CliRunner().invoke(app, [*words])

    rows, home = str(tmp_path / "rows.parquet"), ["--home", str(tmp_path / "none"), "--json"]
    shown = run("training-set", "--entities", rows, "--features",
                "origin_departures.count_1h, tail_arrivals", "--out", str(out), *home)  # fmt: skip
    assert shown.exit_code == 0, shown.output
    assert json.loads(shown.stdout)["rows"] == 20
    assert pl.read_parquet(out).columns[-3:] == [
        f"tail_arrivals.{name}" for name in ("delay_latest", "delay_mean_1d", "age")
    ]
    shown = run("about", str(out))
    assert json.loads(shown.stdout)["kind"] == "point_in_time"
    wrong = run("training-set", "--entities", "nowhere.parquet", "--features", "x", "--out", "y")
    assert isinstance(wrong.exception, Misdeclared)


async def late_record(
    definitions: Definitions,
    events: pl.DataFrame,
    row: int,
    *,
    taken: bool = False,
    until_us: int = 10**15,
) -> pl.DataFrame:
    """What the service writes for an event that came late; see `lateness.late_records`."""
    view = definitions.view("sensors@v1")
    topic = "events.reading"
    placed = events.with_columns(
        pl.col("occurred_at").cast(pl.Datetime("us", "UTC")).to_physical().alias("occurred_at_us"),
        pl.lit(0).alias("source"),
        pl.int_range(pl.len()).alias("position"),
    )
    state = PartitionState([view])
    found = state.store.read("reading", placed)[view.id].take(np.array([row]))
    raw = RawBatch(topic, 0, np.array([row]), [None], [b""], np.array([0]))
    batch = Batch(topic, 0, events[[row]], np.array([0]), raw)
    behind = Behind(np.array([0]), np.array([taken]))
    sent = late_records(batch, [Late(view, found, np.array([row]), behind)], until_us)
    cause = {"topic": topic, "partition": 0, "position": row, "index": 0, "origin": None}
    return sent.frame.with_columns(
        pl.Series("cause", [cause] * sent.frame.height), event_id=pl.lit("late")
    )


async def test_what_came_too_late_is_left_out(tmp_path: Path) -> None:
    definitions = definitions_of(SENSORS)
    events = readings([1.0, 5.0, 9.0], [0, 10, 20])
    late = await late_record(definitions, events, 1)
    twice = pl.concat([late, late])  # a record that was sent again has the same cause
    names, want = ["sensors", "moved.small_sum_1h"], [2.0, 5.0, 9.0, 9.0]
    for number, (record, found) in enumerate([(late, want), (twice, want), (None, None)]):
        folder = tmp_path / str(number)
        folder.mkdir()
        more = {} if record is None else {LATE: record}
        fill(folder, definitions.catalogue, {"events.reading": events, **more})
        with lake_of(folder, definitions.catalogue) as lake:
            made = training_set(asked([30]), names, lake, definitions)
        vector = matrix_of(made.frame, made.about["features"])[0].tolist()[:4]
        # control: without the record it counts
        assert vector == (found or [3.0, 5.0, 9.0, 9.0])
        if record is not None:
            assert made.about["lake"][f"decoded.{LATE.replace('.', '_')}"]["records"] > 0


async def test_what_came_late_and_was_taken_counts_after_what_had_been_applied(
    tmp_path: Path,
) -> None:
    definitions = definitions_of(SENSORS)
    events = readings([1.0, 5.0, 9.0], [0, 10, 20])
    until_us = int((START + timedelta(minutes=25)).timestamp() * 1e6)
    late = await late_record(definitions, events, 1, taken=True, until_us=until_us)
    counts = {}
    for number, record in enumerate([late, None, late.drop("taken")]):
        folder = tmp_path / str(number)
        folder.mkdir()
        more = {} if record is None else {LATE: record}
        fill(folder, definitions.catalogue, {"events.reading": events, **more})
        with lake_of(folder, definitions.catalogue) as lake:
            made = training_set(asked([10, 12, 25, 26]), ["sensors"], lake, definitions).frame
        counts[number] = made["sensors.count_1h"].to_list()
    # control: without the record it counts since its own time, and an older record is of a miss
    assert counts == {0: [1.0, 1.0, 2.0, 3.0], 1: [1.0, 2.0, 3.0, 3.0], 2: [1.0, 1.0, 2.0, 2.0]}


def test_an_event_that_a_view_cannot_take_is_left_out_of_it_alone(tmp_path: Path) -> None:
    definitions = definitions_of(SENSORS)
    events = readings([1.0, 2.0e13, 3.0], [0, 10, 20]).with_columns(
        value=pl.Series([1.0, -2.0e13, 3.0])
    )
    fill(tmp_path, definitions.catalogue, {"events.reading": events})
    with lake_of(tmp_path, definitions.catalogue) as lake:
        made = training_set(asked([30]), ["sensors.count_1h", "moved"], lake, definitions)
    count, small = matrix_of(made.frame, made.about["features"])[0].tolist()
    assert count == 2.0
    assert small == -20.0


def test_a_correction_counts_from_its_own_time_on(tmp_path: Path) -> None:
    """The second reading takes the place of the first."""
    body = {
        "event": "reading",
        "entity": "sensor",
        "corrects": "site",
        "features": {"*": ["count 1h"], "value": ["max 1h", "p50 1h"]},
        "tile": "5m",
    }
    definitions = definitions_of({"views": {"fixed": body}})
    events = readings([5.0, 2.0, 3.0], [0, 10, 20]).with_columns(
        pl.Series("site", ["x", "e0", "x"])
    )
    fill(tmp_path, definitions.catalogue, {"events.reading": events})
    with lake_of(tmp_path, definitions.catalogue) as lake:
        made = training_set(asked([5, 30, 10, 11]), ["fixed"], lake, definitions).frame
    assert made["fixed.count_1h"].to_list() == [1.0, 2.0, 1.0, 1.0]
    assert made["fixed.value_max_1h"].to_list() == [5.0, 3.0, 5.0, 2.0]


def test_a_field_that_came_later_has_its_default_before(tmp_path: Path) -> None:
    """As a decoder that reads an older record has it."""
    older = definitions_of(SENSORS)
    fill(tmp_path, older.catalogue, {"events.reading": readings([1.0, 5.0], [0, 10])})
    topic = older.catalogue.topic("events.reading")
    more = {"name": "weight", "type": "double", "default": 2.0}
    record = {**topic.record, "fields": [*topic.record["fields"], more]}
    topics = {**older.catalogue.topics, topic.name: replace(topic, record=record)}
    body = {"event": "reading", "entity": "sensor", "features": {"weight": ["sum 1h"]}}
    newer = replace(
        older,
        catalogue=replace(older.catalogue, topics=topics),
        views=tuple(parse_views({"views": {"w": body}})),
    )
    sums = []
    for known in (False, True):
        if known:  # the table has the column by now
            later = readings([3.0], [20]).with_columns(weight=0.5)
            fill(tmp_path, newer.catalogue, {topic.name: later})
        with lake_of(tmp_path, newer.catalogue) as lake:
            made = training_set(asked([30]), ["w"], lake, newer)
        sums.append(made.frame["w.weight_sum_1h"].item())
    assert sums == [4.0, 4.5]


def test_on_demand_features_are_made_from_both(tmp_path: Path) -> None:
    definitions = definitions_of(SENSORS)
    fill(tmp_path, definitions.catalogue, {"events.reading": readings([1.0, 5.0], [0, 10])})
    rows = asked([5, 30]).with_columns(pl.Series("input.more", [1.0, None]))
    with lake_of(tmp_path, definitions.catalogue) as lake:
        made = training_set(rows, ["made.per_reading", "sensors.count_1h"], lake, definitions)
    assert made.frame["made.per_reading"].fill_nan(None).to_list() == [2.0, None]
    assert made.frame["sensors.count_1h"].to_list() == [1.0, 2.0]
    assert made.about["on_demand"]


def test_slices_and_instants(tmp_path: Path) -> None:
    definitions = definitions_of(SENSORS)
    fill(tmp_path, definitions.catalogue, {"events.reading": readings([1.0, 5.0], [0, 10])})
    rows = asked([10.5])
    counts = {}
    with lake_of(tmp_path, definitions.catalogue) as lake:
        for slice_us in (0, 60_000_000, 600_000_000, 3_600_000_000):
            made = training_set(
                rows, ["sensors.count_1h"], lake, definitions, slice_us=slice_us
            ).frame
            counts[slice_us] = made["sensors.count_1h"].item()
    assert list(counts.values()) == [2.0, 1.0, 1.0, 0.0]


def wrong(change: Callable[[pl.DataFrame], pl.DataFrame]) -> pl.DataFrame:
    return change(asked([30]))


@pytest.mark.parametrize(
    ("rows", "names", "says"),
    [
        (asked([30]), ["nothing.here"], "no feature or view 'nothing.here'; the views are moved"),
        (asked([30]), ["sensors.mean"], "sensors@v1 has count_1h, value_mean_1h"),
        (asked([30]), [], "no feature is named"),
        (wrong(lambda f: f.drop("sensor")), ["sensors"], "no column 'sensor'"),
        (wrong(lambda f: f.drop("tenant_id")), ["sensors"], "no column 'tenant_id'"),
        (asked([30]), ["made.per_reading"], "no column 'input.more'"),
        (wrong(lambda f: f.drop("occurred_at")), ["sensors"], "no column occurred_at"),
        (wrong(lambda f: f.cast({"occurred_at": pl.String})), ["sensors"], "must be a timestamp"),
        (asked([30], features_as_of=1), ["sensors"], "a column features_as_of already"),
        (asked([300]), ["sensors"], "is whole before 2020-01-01 02:00"),
    ],
)
def test_what_is_wrong_is_said(
    rows: pl.DataFrame, names: list[str], says: str, tmp_path: Path
) -> None:
    definitions = definitions_of(SENSORS)
    whole_us = int((START + timedelta(hours=2)).timestamp() * 1e6)
    fill(
        tmp_path,
        definitions.catalogue,
        {"events.reading": readings([1.0], [0])},
        whole_before_us=whole_us,
    )
    with lake_of(tmp_path, definitions.catalogue) as lake:
        with pytest.raises(Misdeclared, match=says):
            training_set(rows, names, lake, definitions)
        made = training_set(asked([300]), ["sensors"], lake, definitions, incomplete=True)
    assert made.frame["sensors.count_1h"].to_list() == [0.0]


def test_a_lake_without_the_events_says_so(tmp_path: Path) -> None:
    definitions = definitions_of(SENSORS)
    missing = pytest.raises(Misdeclared, match="nothing was written to it")
    with lake_of(tmp_path, definitions.catalogue) as lake, missing:
        training_set(asked([30]), ["sensors"], lake, definitions)


def test_vectors_that_were_served_come_back_as_they_were(tmp_path: Path) -> None:
    catalogue = definitions_of(SENSORS).catalogue
    vectors = np.array([[1.0, np.nan], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]], "<f4")
    at = [START + timedelta(hours=n) for n in range(4)]
    common = {"tenant_id": ["t"] * 4, "occurred_at": at, "model": ["m"] * 4}
    predictions = pl.DataFrame(
        {
            **common,
            "request_id": [f"r{n}" for n in range(4)],
            "version": [1, 1, 1, 2],
            "outcome": ["predicted", "predicted", "failed", "predicted"],
            "score": [0.1, 0.2, None, 0.4],
            "vector": [row.tobytes() for row in vectors],
        }
    )
    entities = [[{"name": "sensor", "value": f"s{n}"}] for n in range(4)]
    requests = pl.DataFrame(
        {**common, "event_id": [f"r{n}" for n in range(4)], "entities": entities}
    )
    versions = pl.DataFrame(
        {
            "tenant_id": ["-"],
            "occurred_at": at[:1],
            "model": ["m"],
            "version": [1],
            "features": [["sensors.count_1h", "input.more"]],
        }
    )
    fill(
        tmp_path,
        catalogue,
        {PREDICTIONS: predictions, REQUESTS: requests, VERSIONS: versions},
    )
    with lake_of(tmp_path, catalogue) as lake:
        made = logged_training_set(lake, Logged("m", 1))
        later = logged_training_set(lake, Logged("m", 1, since=at[1]))
        with pytest.raises(Misdeclared, match="knows no m@3"):
            logged_training_set(lake, Logged("m", 3))
    assert made.frame["request_id"].to_list() == ["r0", "r1"]
    assert made.frame["entity.sensor"].to_list() == ["s0", "s1"]
    assert matrix_of(made.frame, made.about["features"]).tobytes() == vectors[:2].tobytes()
    assert later.frame["request_id"].to_list() == ["r1"]
    assert (made.about["kind"], made.about["rows"]) == ("logged", 2)
