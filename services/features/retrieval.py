"""Vectors of entities out of the memory of this instance, one or many at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import polars as pl
from pydantic import BaseModel

from causemesh.admin import Problem
from causemesh.bus.partitioner import partitions_of
from services.features.domain.definitions import FeatureView
from services.features.domain.entities import NOBODY
from services.features.domain.events import SEPARATOR
from services.features.handlers import Join

Held = Mapping[int, Join]
"""The processors that this instance runs, by partition."""


class VectorRow(BaseModel):
    """An entity's features in the order of the answer's `features`, as of `as_of_us`.

    `unknown`: the view has seen no event of it; `elsewhere`: another instance holds its partition;
    `backfilling`: the view is new, and its past is being computed.
    """

    entity: dict[str, str]
    status: Literal["found", "unknown", "elsewhere", "backfilling"]
    partition: int
    as_of_us: int | None = None
    values: list[float | None] | None = None


def key_of(view: FeatureView, parts: Sequence[str], tenant_id: str | None) -> str:
    """The entity's key in the state of `view`. Raises Problem when a part is missing."""
    if len(parts) != len(view.entity):
        raise Problem(422, "invalid", f"{view.name} is keyed by {', '.join(view.entity)}")
    if view.scope == "tenant" and tenant_id is None:
        raise Problem(422, "invalid", f"{view.name} has a state for each tenant: give tenant_id")
    whole = [*([str(tenant_id)] if view.scope == "tenant" else []), *parts]
    escaped = [part.replace("\x1e", "\x1e0").replace(SEPARATOR, "\x1e1") for part in whole[:-1]]
    return SEPARATOR.join([*escaped, whole[-1]])


def named_parts(view: FeatureView, entity: Mapping[str, str]) -> tuple[str, ...]:
    """The parts of an entity given by name, in the view's order. Raises Problem for other names."""
    if set(entity) != set(view.request_entity):
        wanted = ", ".join(view.request_entity)
        raise Problem(422, "invalid", f"{view.name} is keyed by {wanted}, not {sorted(entity)}")
    return tuple(entity[name] for name in view.request_entity)


def vectors_of(
    view: FeatureView,
    entities: Sequence[Sequence[str]],
    tenant_id: str | None,
    held: Held,
    partitions: int,
) -> list[VectorRow]:
    """The current vectors of entities (each as its parts), in the order asked.

    Raises Problem for an entity that can't be one of the view.
    """
    keys = [key_of(view, parts, tenant_id) for parts in entities]
    numbers = partitions_of([parts[0].encode() for parts in entities], partitions, unkeyed=0)
    rows = [
        VectorRow(
            entity=dict(zip(view.request_entity, parts, strict=True)),
            status="elsewhere",
            partition=_holder(view, number, held),
        )
        for parts, number in zip(entities, numbers.tolist(), strict=True)
    ]
    for number in sorted({row.partition for row in rows} & set(held)):
        mine = [at for at, row in enumerate(rows) if row.partition == number]
        _answer(view, held[number], [keys[at] for at in mine], [rows[at] for at in mine])
    return rows


def _holder(view: FeatureView, number: int, held: Held) -> int:
    """The partition whose state has it: for a broadcast view any that is here."""
    return next(iter(held), number) if view.placement == "broadcast" else number


def _answer(view: FeatureView, join: Join, keys: Sequence[str], rows: Sequence[VectorRow]) -> None:
    if view.id in join.backfills.held:
        for row in rows:
            row.status = "backfilling"
        return
    state = join.state.store.views[view.id]
    as_of_us = state.applied_until_us or 0
    places = state.index.find(pl.Series("entity", keys, dtype=pl.String))
    matrix = state.answer_rows(places, np.full(len(keys), as_of_us, np.int64), ())
    for place, row, vector in zip(places.tolist(), rows, matrix, strict=True):
        row.status = "unknown" if place == NOBODY else "found"
        if row.status == "found":
            row.as_of_us = as_of_us
            row.values = [None if np.isnan(value) else float(value) for value in vector]
