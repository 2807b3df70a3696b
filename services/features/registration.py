"""Whether the views can be served at all, checked before anything is read."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from causemesh.catalogue import Catalogue
from causemesh.codec.columns import frame_schema
from services.features.domain.definitions import FeatureView
from services.features.domain.durations import format_duration
from services.features.domain.events import read_events
from services.features.domain.failures import DefinitionError
from services.features.domain.memory import check_budget
from services.features.rekeying import view_index

_DAY_US = 86_400_000_000


def check_views(views: Sequence[FeatureView], catalogue: Catalogue, budget_bytes: int) -> None:
    """Raises Misdeclared, naming the view, for what would fail on the first event.

    That is an event type that is not declared, a column that it does not have or that is no number,
    a window longer than the topic keeps its events (a new instance could not be filled from the
    log), and more state than the memory budget.
    """
    for view in views:
        topic = catalogue.topic(f"events.{view.event_type}")
        read_events(view, _no_events(frame_schema(topic.record)))
        for window in view.windows:
            if window.reach_us > topic.retention_days * _DAY_US:
                raise DefinitionError(
                    f"view {view.id!r}: window {window.text} looks back "
                    f"{format_duration(window.reach_us)}, but {topic.name} keeps its events for "
                    f"{topic.retention_days} days: give the event type more `retention_days`"
                )
    _check_indexes(views)
    check_budget(views, budget_bytes)


def _check_indexes(views: Sequence[FeatureView]) -> None:
    known: dict[int, str] = {}
    for view in views:
        other = known.setdefault(view_index(view), view.id)
        if other != view.id:
            raise DefinitionError(f"{view.id} and {other} share a checksum: rename one of them")


def _no_events(columns: pl.Schema) -> pl.DataFrame:
    added = {"occurred_at_us": pl.Int64(), "source": pl.Int64(), "position": pl.Int64()}
    return pl.DataFrame(schema={**columns, **added})
