"""The admin API of drift: what was measured, what alerted, and which versions are known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import sqlalchemy as sa
from fastapi import APIRouter, Depends, Query
from pydantic import BaseModel

from causemesh.admin import Page, PageParams, Problem, page_of
from services.drift.domain.versions import Version
from services.drift.findings import FINDING_KEY, Findings, Wanted
from services.drift.store import alerts, reports
from services.drift.versions import Versions


class DriftReport(BaseModel):
    """One measure of one day; `column` is null but for psi."""

    model: str
    version: int
    day: str
    detector: str
    column: str | None
    value: float
    records: int


class DriftAlert(BaseModel):
    """A measure that crossed its threshold."""

    model: str
    version: int
    day: str
    detector: str
    column: str | None
    value: float
    threshold: float


class Label(BaseModel):
    """Which events label a version's requests."""

    event_type: str
    request_id: str
    positive: str


class ModelVersion(BaseModel):
    """A known version; `problem` says why it can't be measured in full.

    `references` are the columns it has a reference for. `last_day_problem` is about its last closed
    day only.
    """

    model: str
    version: int
    features: list[str]
    references: list[str]
    label: Label | None
    problem: str | None
    last_closed_day: str | None
    last_day_problem: str | None


def wanted(
    model: str | None = None,
    version: int | None = None,
    day: Annotated[str | None, Query(pattern=r"^\d{4}-\d{2}-\d{2}$")] = None,
) -> Wanted:
    """The filters of a list of findings; no filter means all. Days are UTC."""
    return Wanted(model, version, day)


_Wanted = Annotated[Wanted, Depends(wanted)]
_Paged = Annotated[PageParams, Depends()]


def routes(findings: Findings, versions: Versions) -> APIRouter:
    """All routes, bound to their connections."""
    api = APIRouter(tags=["drift"])

    async def found(table: sa.Table, chosen: Wanted, params: PageParams) -> Page[dict[str, Any]]:
        after = _key(params.after, (str, str, int, int))
        rows = await findings.page(table, chosen, after, params.limit + 1)
        return page_of(rows, params.limit, lambda row: [row[name] for name in FINDING_KEY])

    @api.get("/reports", response_model=Page[DriftReport])
    async def list_reports(chosen: _Wanted, params: _Paged) -> Page[dict[str, Any]]:
        """Daily measures, newest day first."""
        return await found(reports, chosen, params)

    @api.get("/alerts", response_model=Page[DriftAlert])
    async def list_alerts(chosen: _Wanted, params: _Paged) -> Page[dict[str, Any]]:
        """Measures that crossed their threshold, newest day first."""
        return await found(alerts, chosen, params)

    @api.get("/models")
    async def list_models(params: _Paged) -> Page[ModelVersion]:
        """The model versions that are known, and the last day that was closed for each."""
        after = _key(params.after, (str, int))
        closed = await findings.last_closed()
        known = [
            _described(one, *closed.get((one.model, one.version), (None, None)))
            for one in versions.all()
            if after is None or (one.model, one.version) > tuple(after)
        ]
        return page_of(
            known[: params.limit + 1], params.limit, lambda one: [one.model, one.version]
        )

    return api


def _key(after: Any, shape: tuple[type, ...]) -> Sequence[Any] | None:
    """The key in a cursor. Raises Problem when it is of another list."""
    if after is None:
        return None
    if not isinstance(after, list) or [type(part) for part in after] != list(shape):
        raise Problem(422, "invalid_cursor", "use next_cursor of the page before")
    return after


def _described(known: Version, last_day: str | None, problem: str | None) -> ModelVersion:
    signature, rule = known.signature, known.rule
    return ModelVersion(
        model=known.model,
        version=known.version,
        features=list(signature.features) if signature else [],
        references=sorted(signature.reference) if signature else [],
        label=Label(**vars(rule)) if rule else None,
        problem=known.problem,
        last_closed_day=last_day,
        last_day_problem=problem,
    )
