"""Real Feast reads what we export, and we read what it says: asserted, nothing is measured.

usage: python -m benchmarks.feast_round_trip [--events 20000]

1. Windowed and newest-value views are exported as a Feast repository with their vectors over time.
2. Feast applies it; `get_historical_features` must give our answers, bit for bit, at random whole
   multiples of the time between rows.
3. Beside them lies a view as users of Feast write it (a ttl, a text among its fields). The registry
   as Feast dumps it is imported; the views must be those expected, and the imported view over the
   source's rows must answer what Feast finds at random times.
"""

from __future__ import annotations

import argparse
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from benchmarks.harness import run_command
from benchmarks.join_vs_feast import FEAST_PYTHON
from services.features.domain.definitions import FeatureView
from services.features.domain.engine import ViewState
from services.features.domain.events import Ints, entity_keys, read_events
from services.features.domain.parsing import parse_views
from services.features.feast.exporting import export, feast_names
from services.features.feast.history import TIMESTAMP, key_columns, vector_history
from services.features.feast.importing import imported

_PEER = Path(__file__).parent / "peers" / "feast_historical.py"
_START_US = 1_767_225_600_000_000
_MINUTE_US = 60_000_000
_EVERY_US = 5 * _MINUTE_US
_ASKED = 2_000
_VIEWS: dict[str, Any] = {
    "views": {
        "door": {
            "event": "opened", "entity": "k", "scope": "shared", "tile": "5m",
            "windows": ["1h", "3h"],
            "features": {"x": ["count", "mean", "std", "max", "last"], "*": ["count 1h/3h"]},
        },
        "door@v2": {
            "event": "opened", "entity": ["k", "m"], "tile": "5m", "retention": "2h",
            "features": {"x": ["latest", "sum 30m"], "*": ["age"]},
        },
    }
}  # fmt: skip
# As a user of Feast writes it: the rows of a source, a time to live, a field that is a text.
_SIMPLE = """
from datetime import timedelta
from feast import Entity, FeatureView, Field, FileSource
from feast.types import Float64, Int64, String
from feast.value_type import ValueType

shop = Entity(name="shop", join_keys=["shop_id"], value_type=ValueType.STRING)
prices = FeatureView(
    name="prices", entities=[shop], ttl=timedelta(hours=2),
    schema=[Field(name="price", dtype=Float64), Field(name="stock", dtype=Int64),
            Field(name="label", dtype=String)],
    source=FileSource(name="price_changes", path="data/prices.parquet",
                      timestamp_field="event_timestamp"),
)
"""
_IMPORTED = {
    "event": "price_changed",
    "entity": ["shop_id"],
    "scope": "shared",
    "features": {"price": ["latest"], "stock": ["latest"]},
    "retention": "7200s",
}


def events(count: int) -> pl.DataFrame:
    """Openings of doors within twelve hours, in order of time."""
    rng = np.random.default_rng(1)
    return pl.DataFrame(
        {
            "tenant_id": pl.Series(rng.integers(0, 3, count)).cast(pl.String),
            "k": pl.Series(rng.integers(0, 40, count)).cast(pl.String),
            "m": pl.Series(rng.integers(0, 2, count)).cast(pl.String),
            "x": np.where(rng.random(count) < 0.1, np.nan, rng.integers(-500, 500, count) / 8),
            "occurred_at_us": _START_US + np.sort(rng.integers(0, 720 * _MINUTE_US, count)),
            "source": np.zeros(count, np.int64),
            "position": np.arange(count),
        }
    )


def asked_of(view: FeatureView, seen: pl.DataFrame, rng: np.random.Generator) -> pl.DataFrame:
    """Entities of the view, one that is unknown, and whole multiples of the time between rows."""
    keys = seen.select(key_columns(view)).sample(_ASKED, with_replacement=True, seed=7)
    keys[0, keys.width - 1] = "nobody"
    at_us = _START_US + rng.integers(0, 200, _ASKED) * _EVERY_US
    at = pl.Series(TIMESTAMP, at_us).cast(pl.Datetime("us", "UTC"))
    return keys.with_columns(at).unique(maintain_order=True)  # Feast answers each once


def our_answers(view: FeatureView, seen: pl.DataFrame, asked: pl.DataFrame) -> pl.DataFrame:
    """What the engine says as of each time, from the events before it."""
    state = ViewState(view)
    keys = entity_keys(asked, view, view.request_entity)
    as_of: Ints = asked[TIMESTAMP].to_physical().to_numpy()
    matrix = state.answer_chunk(read_events(view, seen), keys, as_of)
    return pl.DataFrame({f.name: matrix[:, place] for place, f in enumerate(view.features)})


def feast_answers(repository: Path, asked: pl.DataFrame, features: list[str]) -> pl.DataFrame:
    """What Feast finds; the dump of its registry lies beside the repository then."""
    question, answer = repository / "asked.parquet", repository / "answers.parquet"
    asked.write_parquet(question)
    argv = [FEAST_PYTHON, _PEER, repository, question, answer, repository / "dump.json"]
    run_command([*argv, *features])
    # Feast leaves out what is asked of a time before an entity's first row
    numbers = pl.DataFrame({"number": pl.int_range(asked.height, eager=True)})
    return numbers.join(pl.read_parquet(answer), on="number", how="left", maintain_order="left")


def same(view: FeatureView, found: pl.DataFrame, want: pl.DataFrame) -> int:
    """Raises AssertionError where two frames differ in a feature; returns how many are numbers.

    Where Feast knows no row of an entity yet, ours must be the answer over no events.
    """
    numbers = 0
    nothing = ViewState(view).answer([None], np.zeros(1, np.int64))[0]
    theirs_of = [found[name].cast(pl.Float32).fill_null(float("nan")) for name in want.columns]
    unknown = np.all([np.isnan(one.to_numpy()) for one in theirs_of], axis=0)
    for name, one, none in zip(want.columns, theirs_of, nothing, strict=True):
        mine = want[name].cast(pl.Float32).to_numpy()
        theirs = np.where(unknown, none, one.to_numpy())
        np.testing.assert_array_equal(theirs, mine, err_msg=name)
        numbers += int(np.isfinite(mine).sum())
    return numbers


def exported(repository: Path, seen: pl.DataFrame) -> None:
    """Export, and compare Feast's history with our answers."""
    views, rng = parse_views(_VIEWS), np.random.default_rng(5)
    histories = {v.id: vector_history(v, [seen], _EVERY_US) for v in views}
    rows = export(repository, "round_trip", views, histories)
    (repository / "simple.py").write_text(_SIMPLE)
    prices(repository)
    names = feast_names(views)
    for view in views:
        asked = asked_of(view, seen, rng)
        features = [f"{names[view.id]}:{f.name}" for f in view.features]
        found = feast_answers(repository, asked, features)
        equal = same(view, found, our_answers(view, seen, asked))
        if equal < _ASKED:
            raise AssertionError(f"{view.id}: only {equal} numbers were compared")
        print(f"{view.id}: {rows[names[view.id]]} rows exported, {equal} numbers equal in Feast")


def prices(repository: Path) -> pl.DataFrame:
    """The rows of the simple view's source, in its file too."""
    rng, count = np.random.default_rng(9), 500
    at_us = _START_US + np.sort(rng.choice(720 * _MINUTE_US, count, replace=False))
    made = pl.DataFrame(
        {
            "shop_id": pl.Series(rng.integers(0, 20, count)).cast(pl.String),
            "price": rng.integers(0, 4_000, count) / 8,
            "stock": rng.integers(0, 100, count),
            "label": ["a"] * count,
            "event_timestamp": pl.Series(at_us).cast(pl.Datetime("us", "UTC")),
        }
    )
    made.write_parquet(repository / "data" / "prices.parquet")
    return made


def taken_over(repository: Path) -> None:
    """Import the registry that Feast dumped, and compare the imported view with Feast."""
    found = imported((repository / "dump.json").read_text(), {"price_changes": "price_changed"})
    body = found.document["views"]["prices"]
    assert body == _IMPORTED, body
    assert found.left_out["prices.label"] == "STRING is no number", found.left_out
    assert set(found.document["views"]) == {"prices", "door", "door_v2"}
    (view,) = parse_views({"views": {"prices": body}})
    rows = prices(repository)
    seen = rows.with_columns(
        tenant_id=pl.lit("t"),
        occurred_at_us=pl.col("event_timestamp").to_physical(),
        source=pl.lit(0, pl.Int64),
        position=pl.int_range(pl.len()),
    )
    rng = np.random.default_rng(11)
    at_us = _START_US + rng.integers(0, 1_000 * _MINUTE_US, _ASKED) // 1000 * 1000 + 500
    asked = pl.DataFrame(
        {
            "shop_id": pl.Series(rng.integers(0, 21, _ASKED)).cast(pl.String),
            TIMESTAMP: pl.Series(at_us).cast(pl.Datetime("us", "UTC")),
        }
    ).unique(maintain_order=True)
    answers = feast_answers(repository, asked, ["prices:price", "prices:stock"])
    want = our_answers(view, seen, asked).rename({"price_latest": "price", "stock_latest": "stock"})
    print(f"imported prices: {same(view, answers, want)} numbers equal in Feast")


def main() -> None:
    """Export, compare, import, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=20_000)
    told = parser.parse_args()
    began = datetime.now(UTC)
    with tempfile.TemporaryDirectory() as folder:
        repository = Path(folder) / "repository"
        exported(repository, events(told.events))
        taken_over(repository)
    print(f"Feast and we agree ({(datetime.now(UTC) - began).total_seconds():.0f} s)")


if __name__ == "__main__":
    main()
