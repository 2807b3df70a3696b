"""The admin API of features: views, models, and any entity's vector."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
from fastapi import APIRouter
from pydantic import BaseModel

from causemesh.admin import Problem, failures
from causemesh.bus.partitioner import partitions_of
from services.features.domain.definitions import FeatureView, by_reference
from services.features.domain.events import SEPARATOR
from services.features.domain.memory import entity_bytes
from services.features.explaining import Asked, Explainer
from services.features.handlers import Join
from services.features.plan import Plan


class ExplainAsk(BaseModel):
    """Whose features, and as of when."""

    tenant_id: str
    entities: dict[str, str | None]
    features: list[str]
    as_of: datetime


@dataclass(frozen=True)
class _Held:
    join: Join
    entity: str


def routes(
    plan: Plan, joins: Callable[[], Mapping[int, Join]], partitions: int, explainer: Explainer
) -> APIRouter:
    """All routes; `joins()` are the processors this instance runs, by partition."""
    api = APIRouter()
    views = by_reference(plan.views)

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
                "entity_bytes": entity_bytes(view),
                **_held_now(view, joins()),
                **_past_of(view, joins()),
            }
            for view in plan.views
        ]

    @api.get("/views/{name}/entities/{entity}", tags=["views"], responses=failures(404, 409, 421))
    async def read_vector(name: str, entity: str, tenant_id: str | None = None) -> dict[str, Any]:
        """An entity's current features, of `name` or `name@vN`.

        Parts of a composite entity are joined by a comma.
        """
        view = views.get(name)
        if view is None:
            raise Problem(404, "not_found", f"no view {name!r}; known: {sorted(views)}")
        held = _held(view, entity.split(","), tenant_id, joins(), partitions)
        if view.id in held.join.backfills.held:
            raise Problem(409, "view_backfilling", held.join.backfills.reason(view.id))
        state = held.join.state.store.views[view.id]
        if held.entity not in state.entities:
            raise Problem(404, "not_found", f"{name} has seen no event of {entity!r}")
        as_of_us = state.applied_until_us or 0
        vector = state.answer([held.entity], np.array([as_of_us]))[0]
        values = [None if np.isnan(value) else float(value) for value in vector]
        features = dict(zip(view.feature_names, values, strict=True))
        return {"view": view.id, "entity": entity, "as_of_us": as_of_us, "features": features}

    @api.get("/models", tags=["models"])
    async def list_models() -> dict[int, Any]:
        """What each partition of this instance knows of models and their schedules."""
        return {partition: join.models() for partition, join in joins().items()}

    @api.post("/explain", tags=["views"])
    async def explain(ask: ExplainAsk) -> dict[str, Any]:
        """Features recomputed from the log, and the raw events behind them, by view."""
        aware = ask.as_of if ask.as_of.tzinfo else ask.as_of.replace(tzinfo=UTC)
        as_of_us = round(aware.timestamp() * 1_000_000)
        asked = Asked(ask.tenant_id, ask.entities, ask.features, as_of_us)
        found = await explainer.explain(asked)
        return {"features": found.values, "events": found.events}

    return api


def _held_now(view: FeatureView, joins: Mapping[int, Join]) -> dict[str, int]:
    """How many entities this instance holds of a view, and the bytes of its state."""
    states = [join.state.store.views[view.id] for join in joins.values()]
    return {
        "entities": sum(len(state.index) for state in states),
        "memory_bytes": sum(state.memory_bytes() for state in states),
    }


def _instant(at_us: int) -> str:
    try:
        return datetime.fromtimestamp(at_us / 1e6, UTC).isoformat()
    except (OverflowError, ValueError):  # neither the lake nor the log held any of it
        return "unknown"


def _past_of(view: FeatureView, joins: Mapping[int, Join]) -> dict[str, Any]:
    """How far a view is that began in the middle, over all partitions of this instance.

    `complete_from` is null where nothing that an answer can see is missing.
    """
    shown = {number: join.backfills.shown(view.id) for number, join in joins.items()}
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


def _held(
    view: FeatureView,
    parts: list[str],
    tenant_id: str | None,
    joins: Mapping[int, Join],
    partitions: int,
) -> _Held:
    """Where the entity's state is. Raises Problem when another instance holds it."""
    if len(parts) != len(view.entity):
        raise Problem(422, "invalid", f"{view.name} is keyed by {', '.join(view.entity)}")
    if view.scope == "tenant" and tenant_id is None:
        raise Problem(422, "invalid", f"{view.name} has a state for each tenant: give tenant_id")
    whole = [*([str(tenant_id)] if view.scope == "tenant" else []), *parts]
    escaped = [part.replace("\x1e", "\x1e0").replace(SEPARATOR, "\x1e1") for part in whole[:-1]]
    number = int(partitions_of([parts[0].encode()], partitions, unkeyed=0)[0])
    owner = next(iter(joins), number) if view.placement == "broadcast" else number
    if owner not in joins:
        raise Problem(421, "held_elsewhere", f"partition {number} is held by another instance")
    return _Held(joins[owner], SEPARATOR.join([*escaped, whole[-1]]))
