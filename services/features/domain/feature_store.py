"""All views of one partition, and vectors across them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import polars as pl

from causemesh.errors import Misdeclared, Poison
from services.features.domain.aggregates import RowEvents
from services.features.domain.definitions import FeatureView, by_reference
from services.features.domain.engine import ViewState
from services.features.domain.events import Ints, ViewEvents, entity_keys, read_events
from services.features.domain.vectors import Vectors, row_bytes


class FeatureStore:
    """The states of the views, by name@vN, and the places of their features."""

    def __init__(self, views: Iterable[FeatureView]) -> None:
        self.views: dict[str, ViewState] = {}
        self._places: dict[str, tuple[str, int]] = {}
        for reference, view in by_reference(views).items():
            if reference == view.id:
                self.views[view.id] = ViewState(view)
            for place, feature in enumerate(view.features):
                self._places[f"{reference}.{feature.name}"] = (view.id, place)

    @property
    def feature_names(self) -> tuple[str, ...]:
        """All features, each once: with the version where the view has a lower one."""
        shortest = {place: name for name, place in self._places.items()}
        return tuple(dict.fromkeys(shortest[place] for place in self._places.values()))

    @property
    def known_names(self) -> tuple[str, ...]:
        """All names that a signature may use: those of lowest versions with and without it."""
        return tuple(self._places)

    def pinned(self, feature_names: Sequence[str]) -> tuple[str, ...]:
        """The names with their versions; Misdeclared when a feature is not defined."""
        self.check(feature_names)
        return tuple(f"{self._places[name][0]}.{name.partition('.')[2]}" for name in feature_names)

    def views_of(self, feature_names: Sequence[str]) -> frozenset[str]:
        """The views, by name@vN, that the features are of; Misdeclared as `check` says."""
        self.check(feature_names)
        return frozenset(self._places[name][0] for name in feature_names)

    def check(self, feature_names: Sequence[str]) -> None:
        """Misdeclared when a feature is not defined."""
        unknown = [name for name in feature_names if name not in self._places]
        if unknown:
            raise Misdeclared(f"no feature view defines {', '.join(unknown)}")

    def read(self, event_type: str, frame: pl.DataFrame) -> dict[str, ViewEvents]:
        """What each view of this event type sees of the events.

        All views read before any keeps anything: Poison names the rows that no view may have.
        """
        found: dict[str, ViewEvents] = {}
        bad: dict[int, str] = {}
        for name, state in self.views.items():
            if state.view.event_type == event_type:
                try:
                    found[name] = read_events(state.view, frame)
                except Poison as poison:
                    bad = poison.rows | bad
        if bad:
            raise Poison(bad)
        return found

    def answer_chunk(
        self,
        requests: pl.DataFrame,
        feature_names: Sequence[str],
        as_of_us: Ints,
        chunk: Mapping[str, Sequence[RowEvents]] | None = None,
    ) -> Vectors:
        """The named features of each request: float32 [n, len(feature_names)].

        `requests` has tenant_id and the entity columns of the views; where it has not, or the value
        is null, the answer is that over no events. `chunk` are events by view that were not
        applied yet: those before a request's as-of time count.
        """
        self.check(feature_names)
        out = np.empty((requests.height, len(feature_names)), np.float32)
        keys: dict[tuple[str, tuple[str, ...]], pl.Series] = {}
        for name, wanted in self._by_view(feature_names).items():
            state = self.views[name]
            keyed_by = (state.view.scope, state.view.request_entity)
            if keyed_by not in keys:  # views of one entity share its key
                keys[keyed_by] = _request_keys(requests, state.view)
            rows = state.index.find(keys[keyed_by])
            answer = state.answer_rows(rows, as_of_us, chunk.get(name, ()) if chunk else ())
            for column, place in wanted:
                out[:, column] = answer[:, place]
        return out

    def answer_signatures(
        self,
        requests: pl.DataFrame,
        signatures: Mapping[str, Sequence[str]],
        as_of_us: Ints,
        chunk: Mapping[str, Sequence[RowEvents]] | None = None,
    ) -> pl.Series:
        """One vector a request, in the features of its `signature`: float32 little-endian."""
        out = np.empty(requests.height, object)
        asked = requests["signature"]
        for signature in dict.fromkeys(asked.to_list()):
            at = np.flatnonzero((asked == signature).to_numpy())
            part = requests if len(at) == requests.height else requests[at]
            matrix = self.answer_chunk(part, signatures[signature], as_of_us[at], chunk)
            out[at] = row_bytes(matrix)
        return pl.Series("vector", out.tolist(), dtype=pl.Binary)

    def memory_bytes(self) -> int:
        """Roughly what the states of all views hold."""
        return sum(state.memory_bytes() for state in self.views.values())

    def _by_view(self, feature_names: Sequence[str]) -> dict[str, list[tuple[int, int]]]:
        wanted: dict[str, list[tuple[int, int]]] = {}
        for column, full_name in enumerate(feature_names):
            view, place = self._places[full_name]
            wanted.setdefault(view, []).append((column, place))
        return wanted


def _request_keys(requests: pl.DataFrame, view: FeatureView) -> pl.Series:
    if not set(view.request_entity) <= set(requests.columns):
        return pl.repeat(None, requests.height, dtype=pl.String, eager=True)
    return entity_keys(requests, view, view.request_entity)
