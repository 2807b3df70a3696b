"""The entity keys of requests for many views: each column is read once, each key joined once."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from services.features.domain.definitions import FeatureView
from services.features.domain.events import FEW, entity_keys, joined_keys

_Texts = Sequence[str | None]


class RequestKeys:
    """The keys of some requests, by view; views of one entity share them."""

    def __init__(self, requests: pl.DataFrame) -> None:
        self._requests = requests
        self._columns = frozenset(requests.columns)
        self._texts: dict[str, _Texts] = {}
        self._keys: dict[tuple[str, ...], _Texts] = {}

    def of(self, view: FeatureView) -> _Texts:
        """The key of each request; null where the requests do not name the view's entity."""
        tenant = ("tenant_id",) if view.scope == "tenant" else ()
        names = (*tenant, *view.request_entity)
        known = self._keys.get(names)
        if known is None:
            known = self._keys[names] = self._joined(view, names)
        return known

    def _joined(self, view: FeatureView, names: tuple[str, ...]) -> _Texts:
        if not self._columns.issuperset(names):
            return [None] * self._requests.height
        if len(names) == 1:
            return self._of_column(names[0])
        if self._requests.height > FEW:
            return entity_keys(self._requests, view, view.request_entity).to_list()
        return joined_keys([self._of_column(name) for name in names])

    def _of_column(self, name: str) -> _Texts:
        known = self._texts.get(name)
        if known is None:
            known = self._texts[name] = self._requests[name].cast(pl.String).to_list()
        return known
