"""A partition's state in pieces and deltas: what is read back is what was written, bit for bit."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from causemesh.checkpoints import planning, storing
from causemesh.checkpoints.manifest import Manifest
from causemesh.errors import Misdeclared
from services.features.domain import parts
from services.features.domain.parsing import parse_views
from services.features.domain.snapshots import unpack, unpack_blobs
from services.features.domain.state import PartitionState
from tests.unit.checkpoints.memory import MemoryFiles

MS = 1000
SLICE_US = 10 * MS
VIEWS = parse_views(
    {
        "views": {
            "plain": {
                "event": "e", "entity": "k", "scope": "shared", "tile": "10ms",
                "windows": ["20ms", "40ms"],
                "features": {
                    "*": ["count", "count session:20ms:60ms", "age"],
                    "x": ["mean", "std", "min", "max", "last", "first", "latest", "ewma 10ms"],
                },
                "retention": "80ms",
            },
            "sketched": {
                "event": "e", "entity": "k", "scope": "shared", "tile": "10ms",
                "windows": ["30ms", "tumbling:20ms"],
                "features": {"x": ["distinct", "p50", "top1", "share2"]},
            },
            "corrected": {
                "event": "e", "entity": "k", "scope": "shared", "tile": "10ms",
                "windows": ["30ms"],
                "features": {"*": ["count"], "x": ["min", "p50", "latest"]},
                "retention": "50ms", "corrects": "fixes", "retracts": "undoes",
            },
            "bare": {
                "event": "e", "entity": "k", "scope": "shared", "retention": "40ms",
                "features": {"x": ["latest"]},
            },
        }
    }
)  # fmt: skip
FEATURES = [f"{view.id}.{feature.name}" for view in VIEWS for feature in view.features]
SCHEMA = {
    "tenant_id": pl.String, "k": pl.String, "occurred_at_us": pl.Int64, "source": pl.Int64,
    "position": pl.Int64, "event_id": pl.String, "x": pl.Float64, "fixes": pl.String,
    "undoes": pl.String,
}  # fmt: skip
ASKED = {"tenant_id": pl.String, "k": pl.String}


def fresh(features: Sequence[str] = FEATURES) -> PartitionState:
    state = PartitionState(VIEWS, slice_us=SLICE_US)
    state.declare("all", features)
    return state


class Run:
    """A partition under random events, watermarks and evictions, saved and read back at random."""

    def __init__(
        self, seed: int, *, keep_order: bool = True, features: Sequence[str] = FEATURES
    ) -> None:
        self.rng = random.Random(seed)
        self.features = features
        self.state = fresh(features)
        self.now_ms = 0
        self.position = 0
        self.files = MemoryFiles()
        self.manifest: Manifest | None = None
        self.epoch = 1
        self.wanted: dict[str, Any] = {}
        self._keep_order = keep_order  # off only in a control arm

    @property
    def place(self) -> storing.PartitionFiles:
        return storing.PartitionFiles(self.files, "g/0", self.epoch, self.rng.choice([0, 3000]))

    def step(self) -> None:
        self.state.add_events("e", self._events(self.rng.randint(0, 12)))
        if self.rng.random() < 0.5:
            self.state.add_requests(self._requests(self.rng.randint(1, 3)))
        if self.rng.random() < 0.7:
            self.now_ms += self.rng.choice([0, 3, 10, 40])
            self.state.advance(self.now_ms * MS)
        if self.rng.random() < 0.3:
            self.state.ready()
        if self.rng.random() < 0.3:
            self.state.evict()

    def save(self) -> None:
        if self.manifest is None:
            self.wanted = contents(self.state)
            manifest = self.place.first(1)
            for number, name in enumerate(self.state.pieces()):
                body = self.state.piece(name)()
                manifest = self.place.with_piece(manifest, name, number, body)
            self.state.track()
        else:
            last = self.manifest
            now = planning.present(last, self.state.pieces())
            last = replace(last, pieces=now)
            delta = self.state.changes()
            chosen = [name for name in self.state.pieces() if self.rng.random() < 0.15]
            made = {name: self.state.piece(name) for name in chosen}
            self.wanted = contents(self.state)
            self.step()  # before the bytes are made: what was taken does not change
            manifest = self.place.advanced(last, delta(), made)
        self.manifest = Manifest.parse(manifest.dump())

    def go_on_from(self, restored: PartitionState) -> None:
        """A crash: what follows rests on what was read back, maybe by other code."""
        assert self.manifest is not None
        parts.LEAST_ROWS = self.rng.choice([3, 5])
        restored.track()
        self.state, self.epoch = restored, self.epoch + 1
        self.manifest = planning.resumed(self.manifest, restored.pieces())

    def restored(self) -> PartitionState:
        assert self.manifest is not None
        state = fresh(self.features)
        bodies = list(self.place.bodies(self.manifest))
        if not self._keep_order:
            self.rng.shuffle(bodies)
        for body in bodies:
            state.apply_part(body)
        state.settle()
        return state

    def _events(self, count: int) -> pl.DataFrame:
        rows = []
        for _ in range(count):
            self.position += 1
            at = max(0, self.now_ms + self.rng.randint(-25, 35))
            key = f"k{self.rng.randrange(8) + self.now_ms // 60}"
            fix = self.rng.random()
            target = f"e{self.rng.randrange(self.position + 2)}"
            value = self.rng.choice([None, self.rng.gauss(0, 5), 1.0, 2.0])
            rows.append(
                (
                    "t", key, at * MS, self.rng.randrange(2), self.position, f"e{self.position}",
                    value, target if fix < 0.1 else None, target if fix > 0.95 else None,
                )
            )  # fmt: skip
        return pl.DataFrame(rows, schema=SCHEMA, orient="row")

    def _requests(self, count: int) -> pl.DataFrame:
        self.position += count
        return pl.DataFrame(
            {
                "source": [3] * count,
                "position": range(self.position, self.position + count),
                "occurred_at_us": [(self.now_ms + self.rng.randint(0, 40)) * MS] * count,
                "mode": [self.rng.choice(["live", "replay"])] * count,
                "signature": ["all"] * count,
                "tenant_id": ["t"] * count,
                "k": [f"k{self.rng.randrange(8)}"] * count,
            }
        )


def contents(state: PartitionState) -> dict[str, Any]:
    """All that a snapshot holds; kept events have no order."""
    found: dict[str, Any] = {}
    for name, blob in unpack_blobs(state.snapshot(), "partition").items():
        header, frames = unpack(blob, "aligner" if name == "aligner" else "view")
        rows = {frame: sorted(one.rows(), key=repr) for frame, one in frames.items()}
        if name == "aligner":  # what waits goes on in the order of arrival
            rows = {frame: one.rows() for frame, one in frames.items()}
            rows |= {kind: [body] for kind, body in unpack_blobs(blob, "aligner").items()}
        found[name] = {key: value for key, value in header.items() if key != "__sizes"}, rows
    until_ms = (state.aligner.applied_until_us or 0) // MS
    found["answers"] = [answers(state, until_ms + more) for more in (0, 15)]
    found["next"] = [next_rows(one.index) for one in state.store.views.values()]
    return found


def next_rows(index: Any) -> list[int]:
    """The rows that the next entities will get."""
    free = sorted(index._free)
    held = [row for row, key in enumerate(index._keys) if key is not None]
    return [*free, index.end][: 1 + sum(row < max(held, default=0) for row in free)]


def answers(state: PartitionState, as_of_ms: int) -> bytes:
    keys = [f"k{n}" for n in range(30)]
    asked = pl.DataFrame({"tenant_id": ["t"] * len(keys), "k": keys}, schema=ASKED)
    as_of_us = np.full(len(keys), as_of_ms * MS)
    return state.store.answer_chunk(asked, FEATURES, as_of_us).tobytes()


def run(seed: int, **arms: bool) -> bool:
    """Whether every state that was read back was the one that had been written."""
    one = Run(seed, **arms)
    for _ in range(24):
        one.step()
        if one.rng.random() < 0.4:
            one.save()
            try:
                restored = one.restored()
            except KeyError:  # in the control arm: a key that is not there
                return False
            if contents(restored) != one.wanted:
                return False
            if one.rng.random() < 0.3:
                one.go_on_from(restored)
    return True


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of a few rows, and files that are merged soon."""
    monkeypatch.setattr(parts, "PIECE_BYTES", 1)
    monkeypatch.setattr(parts, "LEAST_ROWS", 3)
    monkeypatch.setattr(planning, "_MANY", 5)
    monkeypatch.setattr(planning, "_TOGETHER", 3)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_what_is_read_back_is_what_was_written(seed: int) -> None:
    assert run(seed)


def test_control_bodies_out_of_order_are_another_state() -> None:
    assert not all(run(seed, keep_order=False) for seed in range(5))


@pytest.mark.parametrize("left_out", ["cleared", "named", "tiles", "cells.0", "latest", "kept"])
def test_control_each_part_of_a_delta_is_needed(
    left_out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it some state is read back wrongly."""

    def less(arrays: Any) -> Any:
        return {name: one for name, one in arrays.items() if len(one) and name != left_out}

    monkeypatch.setattr(parts, "_filled", less)
    assert not all(run(seed) for seed in range(12))


def test_a_run_has_of_everything() -> None:
    """Several restarts, merged files, files that were dropped; or the test above shows little."""
    one = Run(7)
    names: set[str] = set()
    for _ in range(60):
        one.step()
        one.save()
        assert one.manifest is not None
        names |= one.manifest.files
    assert one.manifest is not None
    assert any(name.endswith("deltas") for name in names)
    assert len(names) > 2 * len(one.manifest.files)
    assert len(one.state.pieces()) > 8


def test_a_view_that_is_new_or_gone_does_not_disturb_the_others() -> None:
    kept = [name for name in FEATURES if not name.startswith("plain@")]
    one = Run(3, features=kept)
    for _ in range(10):
        one.step()
        one.save()
    assert one.manifest is not None
    for views in (VIEWS[1:], [*VIEWS, parse_views(other("new"))[0]]):
        state = PartitionState(views, slice_us=SLICE_US)
        for body in one.place.bodies(one.manifest):
            state.apply_part(body)
        state.settle()
        shared = [view.id for view in views if view in VIEWS]
        assert {name: _dumped(state, name) for name in shared} == {
            name: _dumped(one.restored(), name) for name in shared
        }


def test_a_view_that_changed_is_refused() -> None:
    one = Run(3)
    one.step()
    one.save()
    assert one.manifest is not None
    changed = PartitionState(parse_views(other("plain")), slice_us=SLICE_US)
    (body, *_) = [b for b in one.place.bodies(one.manifest) if b"view.plain" in b]
    with pytest.raises(Misdeclared, match="give a changed view a new version"):
        changed.apply_part(body)


def other(name: str) -> dict[str, Any]:
    body = {"event": "e", "entity": "k", "scope": "shared", "tile": "10ms", "windows": ["20ms"]}
    return {"views": {name: {**body, "features": {"x": ["sum"]}}}}


def _dumped(state: PartitionState, name: str) -> Sequence[Any]:
    _, frames = unpack(state.store.views[name].snapshot(), "view")
    return [sorted(frame.rows(), key=repr) for frame in frames.values()]
