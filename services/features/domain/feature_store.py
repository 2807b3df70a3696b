"""All views of one partition, and vectors across them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from causemesh.errors import Misdeclared, Poison
from services.features.domain.aggregates import RowEvents
from services.features.domain.definitions import FeatureView, by_reference
from services.features.domain.engine import ViewState
from services.features.domain.events import Ints, ViewEvents, read_events
from services.features.domain.layout import Selector, selector
from services.features.domain.request_keys import RequestKeys
from services.features.domain.vectors import Vectors, row_bytes

# A partition knows few signatures, but anybody may ask the API for any features.
_MOST_PLANS = 1_000


@dataclass(frozen=True)
class _Part:
    """What one view gives to the answer: these of its features, as these numbers of a vector."""

    name: str
    places: Selector
    columns: Selector


class FeatureStore:
    """The states of the views, by name@vN, and the places of their features."""

    def __init__(self, views: Iterable[FeatureView]) -> None:
        self.views: dict[str, ViewState] = {}
        self._places: dict[str, tuple[str, int]] = {}
        self._plans: dict[tuple[str, ...], tuple[_Part, ...]] = {}
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
        plan = self._plan(tuple(feature_names))
        out = np.empty((len(feature_names), requests.height), np.float32)
        keys = RequestKeys(requests)
        for part in plan:
            state = self.views[part.name]
            found = state.index.find_texts(keys.of(state.view))
            answer = state.answer_rows(found, as_of_us, chunk.get(part.name, ()) if chunk else ())
            out[part.columns] = answer.T[part.places]
        return out.T

    def answer_signatures(
        self,
        requests: pl.DataFrame,
        signatures: Mapping[str, Sequence[str]],
        as_of_us: Ints,
        chunk: Mapping[str, Sequence[RowEvents]] | None = None,
    ) -> pl.Series:
        """One vector a request, in the features of its `signature`: float32 little-endian."""
        asked = requests["signature"].to_list()
        distinct = dict.fromkeys(asked)
        if len(distinct) == 1:  # as with any request that comes alone
            matrix = self.answer_chunk(requests, signatures[asked[0]], as_of_us, chunk)
            return pl.Series("vector", row_bytes(matrix), dtype=pl.Binary)
        out = np.empty(requests.height, object)
        of = np.array(asked, object)
        for signature in distinct:
            at = np.flatnonzero(of == signature)
            matrix = self.answer_chunk(requests[at], signatures[signature], as_of_us[at], chunk)
            out[at] = row_bytes(matrix)
        return pl.Series("vector", out.tolist(), dtype=pl.Binary)

    def memory_bytes(self) -> int:
        """Roughly what the states of all views hold."""
        return sum(state.memory_bytes() for state in self.views.values())

    def _plan(self, feature_names: tuple[str, ...]) -> tuple[_Part, ...]:
        """Which view gives which numbers, worked out once a list of features."""
        known = self._plans.get(feature_names)
        if known is None:
            self.check(feature_names)
            wanted: dict[str, list[tuple[int, int]]] = {}
            for column, full_name in enumerate(feature_names):
                view, place = self._places[full_name]
                wanted.setdefault(view, []).append((place, column))
            known = tuple(
                _Part(name, *map(selector, np.array(pairs).T)) for name, pairs in wanted.items()
            )
            if len(self._plans) >= _MOST_PLANS:
                self._plans.clear()
            self._plans[feature_names] = known
        return known
