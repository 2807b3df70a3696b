"""From a lake on disk to a Feast repository, by the command; no server is needed for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import yaml
from typer.testing import CliRunner

from benchmarks.lake_writing import PROJECT, Work, lake
from services.features.domain.engine import ViewState
from services.features.domain.events import entity_keys, read_events
from services.features.domain.parsing import parse_views
from services.features.feast import app

_HOUR_US = 3_600_000_000


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Work:
    made = Work(4_000)
    assert lake(made, tmp_path) == 4_000
    monkeypatch.setenv("CAUSEMESH_LAKE_CATALOG", f"sqlite:///{tmp_path}/c.db")
    monkeypatch.setenv("CAUSEMESH_LAKE_WAREHOUSE", f"file://{tmp_path}/tables")
    monkeypatch.setenv("CAUSEMESH_PROJECT", str(PROJECT))
    monkeypatch.setenv("CAUSEMESH_PARTITIONS", "1")
    return made


def test_the_command_exports_the_lakes_events(work: Work, tmp_path: Path) -> None:
    out, view_id = tmp_path / "repository", "carrier_departures@v1"
    told = ["export", "--out", str(out), "--every", "1h", "--view", view_id]
    done = CliRunner().invoke(app.app, [*told, "--home", str(tmp_path / "no-mesh")])
    assert done.exit_code == 0, done.output
    rows = pl.read_parquet(out / "data" / "carrier_departures.parquet")
    views = parse_views(yaml.safe_load((PROJECT / "features.yaml").read_text()))
    (view,) = (one for one in views if one.id == view_id)
    events = work.frame.with_columns(
        occurred_at_us=pl.col("occurred_at").to_physical(),
        source=pl.lit(0, pl.Int64),
        position=pl.int_range(pl.len()),
    )
    state = ViewState(view)
    keys = entity_keys(rows, view, view.request_entity)
    as_of = rows["event_timestamp"].to_physical().to_numpy()
    want = state.answer_chunk(read_events(view, events), keys, as_of)
    names = [feature.name for feature in view.features]
    found = rows.select(pl.col(name).fill_null(float("nan")) for name in names).to_numpy()
    np.testing.assert_array_equal(found, want)
    # ten carriers a day, and a row an hour while something changes; the last says nothing is left
    assert rows["carrier"].n_unique() == 10
    assert rows.height > 10 * 24
    assert rows.sort("event_timestamp")[-1].select(names).row(0) == (None, None)
    assert (rows["event_timestamp"].to_physical() % _HOUR_US == 0).all()


def test_a_view_that_is_not_there_is_said(work: Work, tmp_path: Path) -> None:
    told = ["export", "--out", str(tmp_path / "r"), "--view", "carrier_departures"]
    done = CliRunner().invoke(app.app, [*told, "--home", str(tmp_path / "no-mesh")])
    assert "use name@vN" in str(done.exception)
