"""What the mesh will find, found without it: `python -m examples.flights.offline`.

Runs the feature engine alone over the replay, trains on all but the last month and measures in that
one. A sanity check of data, features and model; takes seconds and needs no server.
"""

from __future__ import annotations

import argparse
import time
from datetime import datetime
from pathlib import Path
from zoneinfo import ZoneInfo

import numpy as np
import polars as pl
import yaml
from sklearn.metrics import roc_auc_score

from examples.flights import export
from examples.flights.dataset import Replay, load, slices
from examples.flights.model import FEATURES, LABEL, Trained, train
from examples.flights.raw import NEW_YORK
from services.features.domain.definitions import FeatureView
from services.features.domain.parsing import parse_views
from services.features.domain.state import PartitionState

_INPUT = "input."
_FAR_FUTURE_US = 2**62


def views() -> list[FeatureView]:
    """The example's feature views."""
    return parse_views(yaml.safe_load((Path(__file__).parent / "features.yaml").read_text()))


def logged_vectors(replay: Replay) -> pl.DataFrame:
    """Every request with the vector it gets: request_id, occurred_at_us, vector, in event order.

    `vector` is an array of float32 in the order of FEATURES, joined in replay mode: the events
    before the request's minute, no others.
    """
    state = PartitionState(views())
    computed = [name for name in FEATURES if not name.startswith(_INPUT)]
    state.declare("late-arrival", computed)
    answered: list[pl.DataFrame] = []
    position = 0
    for until_us, frames in slices(replay, hours=24):
        for kind, frame in frames.items():
            placed = _placed(frame, position)
            position += frame.height
            if kind == "requests":
                state.add_requests(_unpacked(placed))
            else:
                state.add_events(kind, placed)
        state.advance(until_us)
        answered.extend(_ready(state))
    state.advance(_FAR_FUTURE_US)
    answered.extend(_ready(state))
    return pl.concat(answered).sort("occurred_at_us", "request_id")


def labels(replay: Replay) -> pl.DataFrame:
    """request_id and positive, for the flights that landed, by the model's label rule."""
    positive = pl.sql_expr(LABEL["positive"])
    return replay.landed.select(request_id=LABEL["request_id"], positive=positive)


def check(replay: Replay, until: datetime) -> tuple[Trained, float]:
    """Train on the requests before `until`; returns that and its AUC on those after."""
    known = logged_vectors(replay).join(labels(replay), on="request_id", maintain_order="left")
    past = pl.col("occurred_at_us") < int(until.timestamp() * 1_000_000)
    before, after = known.filter(past), known.filter(~past)
    trained = train(
        before["vector"].to_numpy(),
        before["positive"].to_numpy(),
        before["occurred_at_us"].to_numpy(),
    )
    scores = export.score(trained.onnx, np.ascontiguousarray(after["vector"].to_numpy()))
    return trained, float(roc_auc_score(after["positive"].to_numpy(), scores))


def _placed(frame: pl.DataFrame, position: int) -> pl.DataFrame:
    """A frame as a consumer has it: numbered, event time as a whole number."""
    return frame.with_columns(
        occurred_at_us=pl.col("occurred_at").to_physical(),
        source=pl.lit(0, pl.Int32),
        position=position + pl.int_range(pl.len()),
    )


def _unpacked(requests: pl.DataFrame) -> pl.DataFrame:
    """Requests with their entities and inputs as columns, as the engine takes them."""
    entities = {name: _value("entities", name) for name in ("tail", "origin", "dest", "carrier")}
    inputs = {name: _value("inputs", name.removeprefix(_INPUT)) for name in _inputs()}
    return requests.with_columns(signature="model", **entities, **inputs)


def _value(array: str, name: str) -> pl.Expr:
    named = pl.element().struct.field("name") == name
    found = pl.col(array).list.eval(pl.element().filter(named)).list.first()
    return found.struct.field("value")


def _ready(state: PartitionState) -> list[pl.DataFrame]:
    ready = state.ready()
    if ready is None:
        return []
    packed = b"".join(ready["vector"].to_list())
    computed = np.frombuffer(packed, "<f4").reshape(ready.height, -1)
    inputs = ready.select(_inputs()).to_numpy().astype(np.float32)
    answer = ready.select(request_id="event_id", occurred_at_us="occurred_at_us")
    return [answer.with_columns(pl.Series("vector", np.hstack([computed, inputs])))]


def _inputs() -> list[str]:
    return [name for name in FEATURES if name.startswith(_INPUT)]


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--months", type=int, default=3, choices=range(2, 13))
    months = parser.parse_args().months
    start = time.perf_counter()
    last_month = datetime(2013, months, 1, tzinfo=ZoneInfo(NEW_YORK))
    trained, auc = check(load(months), last_month)
    took = time.perf_counter() - start
    print(f"trained on months 1-{months - 1}: AUC {trained.auc:.3f} on the last quarter of them")
    print(f"AUC in month {months}: {auc:.3f}")
    print(f"exported scores differ by at most {trained.export_difference:.1e}")
    print(f"{took:.1f} s in all")


if __name__ == "__main__":
    _main()
