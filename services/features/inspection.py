"""What views are, how fresh their state is, how many entities it holds and what it costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel

from causemesh.runner import NEVER
from services.features.domain.definitions import CORRECTION_COLUMNS, Feature, FeatureView
from services.features.domain.durations import format_duration
from services.features.domain.engine import ViewState
from services.features.domain.memory import entity_bytes
from services.features.domain.parsing import PARAMETERS
from services.features.handlers import Join

_SECOND_US = 1_000_000


class FeatureDefinition(BaseModel):
    """One number of the vector; windows as they are written in features.yaml."""

    name: str
    aggregation: str
    column: str | None
    window: str | None
    per: str | None
    parameter: float | None


class ViewDefinition(BaseModel):
    """Everything a view means. `fingerprint` changes when the meaning of its state does."""

    view: str
    name: str
    version: int
    fingerprint: str
    event: str
    entity: list[str]
    request_entity: list[str]
    scope: str
    placement: str
    filter: str | None
    columns: dict[str, str]
    features: list[FeatureDefinition]
    tile: str
    tiles: int
    resolution: float
    retention: str | None
    lateness: str | None
    corrects: str | None
    retracts: str | None
    entities: int


class Freshness(BaseModel):
    """How far a view is in a partition, in event time (microseconds).

    All events before `applied_until_us` count; `watermark_us` is what the inputs have promised.
    Null before any promise. `age_seconds` is the wall clock less `applied_until_us`.
    """

    view: str
    partition: int
    watermark_us: int | None
    applied_until_us: int | None
    age_seconds: float | None


class Cardinality(BaseModel):
    """Entities with state, by partition of this instance; evictions since its worker began.

    A broadcast view is held whole in every partition, so its counts are not to be added up.
    `declared` is what features.yaml says that there may be.
    """

    view: str
    placement: str
    declared: int
    entities: dict[int, int]
    evicted: dict[int, int]


class Memory(BaseModel):
    """Bytes of a view's state on this instance, over all its partitions.

    `per_entity_bytes` is what an entity costs now (arrays grow ahead of need; null without one),
    `budgeted_entity_bytes` what the start-up check counts for each of the `declared` ones.
    """

    view: str
    bytes: int
    entities: int
    per_entity_bytes: float | None
    budgeted_entity_bytes: int
    declared: int


class MemoryAnswer(BaseModel):
    """The memory of all views, and the budget that the declared entities were checked against."""

    budget_bytes: int
    total_bytes: int
    views: list[Memory]


def definition(view: FeatureView) -> ViewDefinition:
    """A view in full."""
    return ViewDefinition(
        view=view.id,
        name=view.name,
        version=view.version,
        fingerprint=view.fingerprint,
        event=view.event_type,
        entity=list(view.entity),
        request_entity=list(view.request_entity),
        scope=view.scope,
        placement=view.placement,
        filter=view.filter,
        columns={
            one.name: one.expression for one in view.columns if one.name not in CORRECTION_COLUMNS
        },
        features=[_feature(one) for one in view.features],
        tile=format_duration(view.tile_us),
        tiles=view.tiles,
        resolution=view.resolution,
        retention=_duration(view.retention_us),
        lateness=_duration(view.lateness_us),
        corrects=view.corrects,
        retracts=view.retracts,
        entities=view.entities,
    )


def freshness(
    views: Sequence[FeatureView],
    held: Mapping[int, Join],
    watermarks: Mapping[int, int],
    now_us: int,
) -> list[Freshness]:
    """By view and partition of this instance."""
    found = []
    for view in views:
        for number, join in sorted(held.items()):
            until_us = join.state.store.views[view.id].applied_until_us
            if until_us is not None and until_us <= NEVER:
                until_us = None
            promised_us = watermarks.get(number, NEVER)
            found.append(
                Freshness(
                    view=view.id,
                    partition=number,
                    watermark_us=None if promised_us <= NEVER else promised_us,
                    applied_until_us=until_us,
                    age_seconds=None if until_us is None else (now_us - until_us) / _SECOND_US,
                )
            )
    return found


def cardinality(views: Sequence[FeatureView], held: Mapping[int, Join]) -> list[Cardinality]:
    """By view."""
    return [
        Cardinality(
            view=view.id,
            placement=view.placement,
            declared=view.entities,
            entities={
                number: len(join.state.store.views[view.id].index)
                for number, join in sorted(held.items())
            },
            evicted={number: join.evicted[view.id] for number, join in sorted(held.items())},
        )
        for view in views
    ]


def memory(
    views: Sequence[FeatureView], held: Mapping[int, Join], budget_bytes: int
) -> MemoryAnswer:
    """By view, and in all."""
    found = [
        _memory(view, [join.state.store.views[view.id] for join in held.values()]) for view in views
    ]
    total = sum(one.bytes for one in found)
    return MemoryAnswer(budget_bytes=budget_bytes, total_bytes=total, views=found)


def past_of(view: FeatureView, held: Mapping[int, Join]) -> dict[str, Any]:
    """How far a view is that began in the middle, over all partitions of this instance.

    `complete_from` is null where nothing that an answer can see is missing.
    """
    shown = {number: join.backfills.shown(view.id) for number, join in held.items()}
    slowest = min(shown.values(), key=lambda one: one.rank, default=None)
    since = [at for one in shown.values() if (at := one.complete_from_us) is not None]
    return {
        "state": "offered" if slowest is None else slowest.state,
        "percent": 100 if slowest is None else slowest.percent,
        "waits_for": None if slowest is None else slowest.waits,
        "cuts": {number: one.cuts for number, one in shown.items() if one.cuts},
        "unfit_events": max((one.unfit for one in shown.values()), default=0),
        "complete_from": _instant(max(since)) if since else None,
    }


def _instant(at_us: int) -> str:
    try:
        return datetime.fromtimestamp(at_us / 1e6, UTC).isoformat()
    except (OverflowError, ValueError):  # neither the lake nor the log held any of it
        return "unknown"


def _memory(view: FeatureView, states: Sequence[ViewState]) -> Memory:
    size = sum(state.memory_bytes() for state in states)
    entities = sum(len(state.index) for state in states)
    return Memory(
        view=view.id,
        bytes=size,
        entities=entities,
        per_entity_bytes=size / entities if entities else None,
        budgeted_entity_bytes=entity_bytes(view),
        declared=view.entities,
    )


def _feature(feature: Feature) -> FeatureDefinition:
    return FeatureDefinition(
        name=feature.name,
        aggregation=feature.aggregation,
        column=feature.column,
        window=None if feature.window is None else feature.window.text,
        per=None if feature.per is None else feature.per.text,
        parameter=feature.parameter if feature.aggregation in PARAMETERS else None,
    )


def _duration(length_us: int | None) -> str | None:
    return None if length_us is None else format_duration(length_us)
