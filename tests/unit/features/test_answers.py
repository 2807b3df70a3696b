"""The path of an answer: its shortcuts must not show."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from causemesh.errors import Misdeclared
from services.features.domain import chunk, ring, tile_windows
from services.features.domain.aggregates import NEVER, NO_MINIMUM, Aggregates
from services.features.domain.chunk import Chunk
from services.features.domain.definitions import FeatureView
from services.features.domain.engine import ViewState
from services.features.domain.events import FEW, entity_keys
from services.features.domain.feature_store import FeatureStore
from services.features.domain.parsing import parse_views
from services.features.domain.request_keys import RequestKeys
from services.features.domain.vectors import row_bytes
from tests.unit.features.reference import Event, expected
from tests.unit.features.test_engine import TILE, make_view, read, same_bits

DOCUMENT = {
    "views": {
        "door": {
            "event": "e",
            "entity": "k",
            "scope": "shared",
            "tile": "1m",
            "features": {"x": ["sum 2m", "mean 3m", "last 2m", "latest", "max 3m"]},
        },
        "door@v2": {
            "event": "e",
            "entity": "k",
            "tile": "1m",
            "features": {"x": ["mean 2m", "sum 1m/3m", "first 3m"], "*": ["count 2m"]},
        },
        "pair": {"event": "e", "entity": ["k", "m"], "tile": "1m", "features": {"x": ["sum 5m"]}},
    }
}
MINUTE = 60_000_000


def filled(count: int = 300) -> tuple[FeatureStore, pl.DataFrame]:
    """A store with events of a few entities, and requests of them and others."""
    store, rng = FeatureStore(parse_views(DOCUMENT)), np.random.default_rng(1)
    frame = pl.DataFrame(
        {
            "tenant_id": pl.Series(rng.integers(0, 2, count)).cast(pl.String),
            "k": pl.Series(rng.integers(0, 9, count)).cast(pl.String),
            "m": pl.Series(rng.integers(0, 2, count)).cast(pl.String),
            "x": rng.integers(-50, 50, count).astype(np.float64),
            "occurred_at_us": np.sort(rng.integers(0, 10 * MINUTE, count)),
            "source": np.zeros(count, np.int64),
            "position": np.arange(count),
        }
    )
    for name, events in store.read("e", frame).items():
        store.views[name].apply(events)
    requests = frame.select("tenant_id", "k", "m").with_columns(
        k=pl.when(pl.int_range(pl.len()) % 7 == 0).then(None).otherwise("k"),
        m=pl.when(pl.int_range(pl.len()) % 11 == 0).then(pl.lit("?")).otherwise("m"),
    )
    return store, requests


@settings(deadline=None)
@given(st.data())
def test_any_features_in_any_order_are_those_of_all(data: st.DataObject) -> None:
    store, requests = filled()
    names = store.known_names  # each feature of a lowest version under two names
    asked = data.draw(st.lists(st.sampled_from(names), max_size=20))
    rows = data.draw(st.integers(1, requests.height))
    requests, as_of = requests.head(rows), np.full(rows, 9 * MINUTE, np.int64)
    whole = store.answer_chunk(requests, names, as_of)
    some = store.answer_chunk(requests, asked, as_of)
    same_bits(some, np.ascontiguousarray(whole[:, [names.index(name) for name in asked]]))
    assert row_bytes(some) == [row.tobytes() for row in np.ascontiguousarray(some)]


def test_unknown_features_are_refused_each_time() -> None:
    store, requests = filled()
    for _ in range(2):
        with pytest.raises(Misdeclared, match=r"door\.y"):
            store.answer_chunk(requests, ["door.y"], np.zeros(requests.height, np.int64))


def test_signatures_of_one_batch_are_answered_apart() -> None:
    store, requests = filled()
    signatures = {"a": store.known_names[:3], "b": store.known_names[2:9]}
    of = pl.Series("signature", [("a", "b")[row % 3 % 2] for row in range(requests.height)])
    as_of = np.arange(requests.height) * MINUTE // 30
    mixed = store.answer_signatures(requests.with_columns(of), signatures, as_of)
    for name, features in signatures.items():
        alone = requests.with_columns(signature=pl.lit(name))
        singly = store.answer_signatures(alone, signatures, as_of)
        matrix = store.answer_chunk(requests, features, as_of)
        assert singly.to_list() == row_bytes(matrix)
        assert mixed.filter(of == name).to_list() == singly.filter(of == name).to_list()


_TEXT = st.none() | st.text("a\x1e\x1f0", max_size=4)


@settings(deadline=None)
@given(
    rows=st.lists(st.tuples(st.sampled_from(["s", "t\x1f"]), _TEXT, _TEXT), max_size=9),
    many=st.booleans(),
)
def test_request_keys_are_entity_keys(rows: list[tuple[str | None, ...]], many: bool) -> None:
    names = dict.fromkeys(("tenant_id", "k", "m"), pl.String)
    requests = pl.DataFrame(rows, schema=names, orient="row")
    if many and rows:
        requests = pl.concat([requests] * (FEW + 1))
    keys = RequestKeys(requests)
    for view in parse_views(DOCUMENT):
        want = entity_keys(requests, view, view.request_entity).to_list()
        assert keys.of(view) == want
    lacking = RequestKeys(requests.drop("m"))
    assert lacking.of(parse_views(DOCUMENT)[2]) == [None] * requests.height


def garbage(array: np.ndarray, length: int) -> np.ndarray:
    """Grown memory as the worst allocator gives it: full of old numbers."""
    grown = np.full((length, *array.shape[1:]), 7, np.int64)
    grown[: len(array)] = array
    return grown


def answers_on_garbage(view: FeatureView) -> tuple[np.ndarray, np.ndarray]:
    events = [Event("a", 35, 0, 0, (1.5, -2.0)), Event("b", 51, 0, 1, (3.0, None))]
    state = ViewState(view)
    state.apply(read(view, events))
    asked = ["a", "b", "unknown", None]
    got = state.answer(asked, np.full(4, 52, np.int64))
    return got, np.array([expected(view, events, one, 52) for one in asked])


def test_memory_that_was_never_written_does_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring, "_grown", garbage)
    view = make_view(wide=True)
    same_bits(*answers_on_garbage(view))


def test_control_without_the_empty_slot_old_memory_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring, "_grown", garbage)
    monkeypatch.setattr(ring, "NOTHING", 5)  # a slot that nobody emptied
    monkeypatch.setattr(tile_windows, "NOTHING", 5)
    ensure = ring.TileRing.ensure

    def unemptied(self: ring.TileRing, rows: int) -> None:
        ensure(self, rows)
        for array in (self._data.sums, self._data.mins, self._data.lasts):
            array[5:6] = 7

    monkeypatch.setattr(ring.TileRing, "ensure", unemptied)
    got, want = answers_on_garbage(make_view())
    assert not np.array_equal(got, want, equal_nan=True)


def test_the_empty_slot_stays_empty() -> None:
    view, state = make_view(wide=True), ViewState(make_view(wide=True))
    for start in range(0, 400, 40):
        names = [f"k{n}" for n in range(start, start + 40)]
        at = start * TILE // 40
        state.apply(read(view, [Event(k, at, 0, n, (1.0, 2.0)) for n, k in enumerate(names)]), at)
        state.evict(at)
    data: Aggregates = state.ring._data
    assert not data.sums[0].any()
    assert (data.mins[0] == NO_MINIMUM).all()
    assert (data.lasts[0] == NEVER).all()


@pytest.mark.parametrize("asked", [3, 30])
def test_a_chunk_that_concerns_nobody_is_none(asked: int) -> None:
    view = make_view()
    state = ViewState(view)
    events = state.encode(read(view, [Event("a", 1, 0, 0, (1.0, None))]))
    others = np.arange(2, 2 + asked)
    assert Chunk.of(state.layout, [events], others) is None
    assert Chunk.of(state.layout, [], others) is None
    some = Chunk.of(
        state.layout, [events, events.take(np.empty(0, np.int64))], np.append(others, 1)
    )
    assert some is not None


@pytest.mark.parametrize("limit", [2**63, 1])
@pytest.mark.parametrize("asked", [1, 4])
def test_both_forms_of_a_chunks_key_find_the_same(
    limit: int, asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Times packed as they are, and by their rank where they are too far apart."""
    monkeypatch.setattr(chunk, "_KEY_LIMIT", limit)
    view, rng = make_view(wide=True), np.random.default_rng(2)
    drawn = zip(rng.integers(0, 3, 40).tolist(), rng.integers(-30, 170, 40).tolist(), strict=True)
    events = [Event("abc"[at], us, 0, n, (float(n % 7), None)) for n, (at, us) in enumerate(drawn)]
    names = ["a", "b", None, "c"][:asked]
    for as_of_us in (-40, 5, 60, 2**50):
        as_of = np.full(asked, as_of_us, np.int64)
        got = ViewState(view).answer_chunk(read(view, events), names, as_of)
        same_bits(got, np.array([expected(view, events, name, as_of_us) for name in names]))
