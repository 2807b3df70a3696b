"""The admin API of features: views, vectors, history, models, and how the state is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Query
from pydantic import BaseModel, Field

from causemesh.admin import Problem, failures
from services.features.domain.definitions import FeatureView, by_reference
from services.features.domain.memory import entity_bytes
from services.features.explaining import Asked, Explainer
from services.features.handlers import Join
from services.features.history import History, Period
from services.features.inspection import (
    Cardinality,
    Freshness,
    MemoryAnswer,
    ViewDefinition,
    cardinality,
    definition,
    freshness,
    memory,
    past_of,
)
from services.features.plan import Plan
from services.features.retrieval import Held, VectorRow, key_of, named_parts, vectors_of

_MOST_ENTITIES = 1_000
_MOST_POINTS = 10_000


class ExplainAsk(BaseModel):
    """Whose features, and as of when."""

    tenant_id: str
    entities: dict[str, str | None]
    features: list[str]
    as_of: datetime


class VectorsAsk(BaseModel):
    """Entities of one view, each by the names of its parts as requests give them."""

    view: str = Field(description="`name@vN`, or `name` for the lowest version.")
    tenant_id: str | None = None
    entities: list[dict[str, str]] = Field(min_length=1, max_length=_MOST_ENTITIES)


class VectorsAnswer(BaseModel):
    """A row for each entity, in the order asked; values in the order of `features`."""

    view: str
    fingerprint: str
    features: list[str]
    rows: list[VectorRow]


class HistoryAsk(BaseModel):
    """Whose past, which features of it, and of when. Event times are UTC if they say none."""

    tenant_id: str | None = None
    feature: list[str] = Field(default=[], description="Such as count_1h; all if there are none.")
    start: datetime | None = Field(default=None, alias="from")
    end: datetime | None = Field(default=None, alias="to", description="Before this time.")
    limit: int = Field(default=100, ge=1, le=_MOST_POINTS, description="The newest so many.")


class Point(BaseModel):
    """Features as of an instant (microseconds): that of an event, and 1 more."""

    as_of_us: int
    values: list[float | None]


class HistoryAnswer(BaseModel):
    """Features just after each event of the entity, oldest first, recomputed from `source`.

    The topic keeps its events for `retention_days`; `skipped` earlier points are beyond the limit.
    """

    view: str
    entity: str
    source: str
    retention_days: int
    features: list[str]
    points: list[Point]
    skipped: int


@dataclass(frozen=True)
class Sources:
    """What the routes read; the functions are asked each time.

    `joins()` are the processors that this instance runs, by partition; `watermarks()` what the
    inputs of each have promised, microseconds; `retention_days(topic)` how long the log has it.
    """

    joins: Callable[[], Mapping[int, Join]]
    watermarks: Callable[[], Mapping[int, int]]
    now_us: Callable[[], int]
    retention_days: Callable[[str], int]
    partitions: int
    budget_bytes: int


def routes(plan: Plan, sources: Sources, explainer: Explainer, history: History) -> APIRouter:
    """All routes."""
    api = APIRouter()
    views = by_reference(plan.views)
    _definitions(api, plan, views, sources)
    _vectors(api, views, sources)
    _history(api, views, sources, history)
    _state(api, plan, sources)

    @api.get("/models", tags=["models"])
    async def list_models() -> dict[int, Any]:
        """What each partition of this instance knows of models and their schedules."""
        return {partition: join.models() for partition, join in sources.joins().items()}

    @api.post("/explain", tags=["views"])
    async def explain(ask: ExplainAsk) -> dict[str, Any]:
        """Features recomputed from the log, and the raw events behind them, by view."""
        asked = Asked(ask.tenant_id, ask.entities, ask.features, _micros(ask.as_of))
        found = await explainer.explain(asked)
        return {"features": found.values, "events": found.events}

    return api


def _definitions(
    api: APIRouter, plan: Plan, views: Mapping[str, FeatureView], sources: Sources
) -> None:
    @api.get("/views", tags=["views"])
    async def list_views() -> list[dict[str, Any]]:
        """Every declared feature view with its features, and what it holds and costs here."""
        return [
            {
                "view": view.id,
                "event": view.event_type,
                "entity": list(view.entity),
                "scope": view.scope,
                "placement": view.placement,
                "features": list(view.feature_names),
                "fingerprint": view.fingerprint,
                "entity_bytes": entity_bytes(view),
                **_held_now(view, sources.joins()),
                **past_of(view, sources.joins()),
            }
            for view in plan.views
        ]

    @api.get("/views/{name}", tags=["views"], responses=failures(404))
    async def read_definition(name: str) -> ViewDefinition:
        """All that `name` or `name@vN` means, with its version and fingerprint."""
        return definition(_named(views, name))


def _vectors(api: APIRouter, views: Mapping[str, FeatureView], sources: Sources) -> None:
    @api.get("/views/{name}/entities/{entity}", tags=["views"], responses=failures(404, 409, 421))
    async def read_vector(name: str, entity: str, tenant_id: str | None = None) -> dict[str, Any]:
        """An entity's current features, of `name` or `name@vN`.

        Parts of a composite entity are joined by a comma.
        """
        view = _named(views, name)
        parts = [entity.split(",")]
        (row,) = vectors_of(view, parts, tenant_id, sources.joins(), sources.partitions)
        if row.status == "elsewhere":
            where = f"partition {row.partition} is held by another instance"
            raise Problem(421, "held_elsewhere", where)
        if row.status == "backfilling":
            backfills = sources.joins()[row.partition].backfills
            raise Problem(409, "view_backfilling", backfills.reason(view.id))
        if row.values is None:
            raise Problem(404, "not_found", f"{name} has seen no event of {entity!r}")
        features = dict(zip(view.feature_names, row.values, strict=True))
        told = {"view": view.id, "entity": entity, "as_of_us": row.as_of_us}
        return {**told, "features": features}

    @api.post("/vectors", tags=["views"], responses=failures(404))
    async def read_vectors(ask: VectorsAsk) -> VectorsAnswer:
        """The current features of many entities of one view, each with its own status."""
        view = _named(views, ask.view)
        parts = [named_parts(view, entity) for entity in ask.entities]
        rows = vectors_of(view, parts, ask.tenant_id, sources.joins(), sources.partitions)
        return VectorsAnswer(
            view=view.id,
            fingerprint=view.fingerprint,
            features=list(view.feature_names),
            rows=rows,
        )


def _history(
    api: APIRouter, views: Mapping[str, FeatureView], sources: Sources, history: History
) -> None:
    @api.get("/views/{name}/entities/{entity}/history", tags=["views"], responses=failures(404))
    async def read_history(
        name: str, entity: str, ask: Annotated[HistoryAsk, Query()]
    ) -> HistoryAnswer:
        """An entity's features just after each of its events, recomputed from the log.

        Reads the view's whole event topic: for people who look at a case, not for requests.
        """
        view = _named(views, name)
        places = _places(view, ask.feature)
        key = key_of(view, entity.split(","), ask.tenant_id)
        period = Period(_optional_micros(ask.start), _optional_micros(ask.end))
        past = await history.read(view, key, period, ask.limit)
        topic = f"events.{view.event_type}"
        return HistoryAnswer(
            view=view.id,
            entity=entity,
            source=f"log:{topic}",
            retention_days=sources.retention_days(topic),
            features=[view.feature_names[place] for place in places],
            points=[
                Point(as_of_us=at_us, values=_numbers(vector[places]))
                for at_us, vector in zip(past.as_of_us.tolist(), past.vectors, strict=True)
            ],
            skipped=past.skipped,
        )


def _state(api: APIRouter, plan: Plan, sources: Sources) -> None:
    @api.get("/freshness", tags=["state"])
    async def read_freshness() -> list[Freshness]:
        """How far event time is, by view and partition of this instance."""
        return freshness(plan.views, sources.joins(), sources.watermarks(), sources.now_us())

    @api.get("/cardinality", tags=["state"])
    async def read_cardinality() -> list[Cardinality]:
        """How many entities each view holds here, and how many it has forgotten."""
        return cardinality(plan.views, sources.joins())

    @api.get("/memory", tags=["state"])
    async def read_memory() -> MemoryAnswer:
        """What the state of each view costs here."""
        return memory(plan.views, sources.joins(), sources.budget_bytes)


def _named(views: Mapping[str, FeatureView], name: str) -> FeatureView:
    if name not in views:
        raise Problem(404, "not_found", f"no view {name!r}; known: {sorted(views)}")
    return views[name]


def _held_now(view: FeatureView, joins: Held) -> dict[str, int]:
    """How many entities this instance holds of a view, and the bytes of its state."""
    states = [join.state.store.views[view.id] for join in joins.values()]
    return {
        "entities": sum(len(state.index) for state in states),
        "memory_bytes": sum(state.memory_bytes() for state in states),
    }


def _places(view: FeatureView, wanted: list[str]) -> list[int]:
    """Where the wanted features are in the vector. Raises Problem for one that is not."""
    names = [feature.name for feature in view.features]
    unknown = sorted(set(wanted) - set(names))
    if unknown:
        raise Problem(422, "invalid", f"{view.id} has no feature {unknown}; it has {names}")
    return [names.index(name) for name in wanted or names]


def _numbers(vector: Any) -> list[float | None]:
    return [None if np.isnan(value) else float(value) for value in vector]


def _optional_micros(at: datetime | None) -> int | None:
    return None if at is None else _micros(at)


def _micros(at: datetime) -> int:
    aware = at if at.tzinfo else at.replace(tzinfo=UTC)
    return round(aware.timestamp() * 1_000_000)
