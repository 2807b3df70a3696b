"""The admin API of inference: artefacts, model versions, schedules."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import onnx
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from causemesh.admin import Problem, failures
from causemesh.catalogue import Catalogue
from causemesh.clock import Clock
from causemesh.errors import Misdeclared
from services.inference.deployments import Deployments
from services.inference.domain import Champion, ModelVersion, checked_schedule
from services.inference.gateways import ModelError, ModelServer
from services.inference.store import ModelStore

_MAX_ARTEFACT_BYTES = 512 << 20


class LabelRule(BaseModel):
    """How to learn what was true: an event type, its request id column, and the positive class."""

    event_type: str
    request_id: str
    positive: str


class ReferenceHistogram(BaseModel):
    """A column's training histogram: n inner edges, n + 2 counts (the last for NaN)."""

    column: str
    edges: list[float]
    counts: list[int]


class VersionAsk(BaseModel):
    """A model version; the artefact is uploaded before."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    version: int = Field(ge=1)
    lane: str = "realtime"
    features: list[str]
    required: list[str] = []
    artefact_sha256: str
    label: LabelRule | None = None
    reference: list[ReferenceHistogram] = []
    metrics: dict[str, float] = {}

    def of(self, model: str) -> ModelVersion:
        """As the domain knows it."""
        return ModelVersion(
            model,
            self.version,
            self.lane,
            tuple(self.features),
            tuple(self.required),
            self.artefact_sha256,
            self.label.model_dump() if self.label else None,
            [one.model_dump() for one in self.reference],
            self.metrics,
        )


class ScheduleEntry(BaseModel):
    """From `effective_at` (event time) on this version answers."""

    version: int
    effective_at: datetime


@dataclass(frozen=True)
class Registry:
    """What the routes work on."""

    store: ModelStore
    deployments: Deployments
    server: ModelServer
    catalogue: Catalogue
    clock: Clock

    async def register(self, version: ModelVersion) -> bool:
        """Check, try and keep a version; False when it was there already.

        Raises Problem (or Misdeclared) saying what to change.
        """
        version.check()
        if f"inference.tasks.{version.lane}.v1" not in self.catalogue.topics:
            raise Misdeclared(f"lane {version.lane!r} has no topic in the catalogue")
        known = await self.store.version(version.model, version.version)
        fresh = known is None
        if known is None:
            await self._try_out(version)
            await self.store.register(version, self.clock.now_us())
            known = await self.store.version(version.model, version.version)
        if known != version:
            detail = f"{version.deployment} is other content; register the next number"
            raise Problem(409, "version_exists", detail)
        return fresh

    async def _try_out(self, version: ModelVersion) -> None:
        """Load the version and run one row of zeros."""
        content = await self.store.artefact(version.artefact_sha256)
        if content is None:
            raise Problem(422, "no_artefact", "PUT the ONNX file to /v1/artefacts first")
        width = _input_width(content)
        if width not in (None, len(version.features)):
            detail = f"the artefact takes {width} columns, features name {len(version.features)}"
            raise Problem(422, "wrong_width", detail)
        try:
            await self.deployments.load(version)
            zeros = np.zeros((1, len(version.features)), dtype=np.float32)
            scores = await self.server.infer(version.deployment, zeros)
        except ModelError as error:
            raise Problem(422, "model_error", f"the model does not run: {error}") from error
        if len(scores) != 1:
            raise Problem(422, "model_error", f"one row gave {len(scores)} scores")

    async def schedule(self, model: str) -> list[dict[str, Any]]:
        """The schedule as the API shows it."""
        return [
            {
                "version": entry.version,
                "effective_at": datetime.fromtimestamp(entry.effective_us / 1e6, UTC).isoformat(),
            }
            for entry in await self.store.schedule(model)
        ]


def routes(registry: Registry) -> APIRouter:
    """All routes, bound to their connections."""
    api = APIRouter(tags=["models"])
    _add_writes(api, registry)
    _add_reads(api, registry)
    return api


def _add_writes(api: APIRouter, registry: Registry) -> None:
    store = registry.store

    @api.put("/artefacts", responses=failures(413))
    async def upload(request: Request) -> dict[str, Any]:
        """Keep an ONNX file (the raw body); answers its SHA-256. Again is no harm."""
        content = await request.body()
        if len(content) > _MAX_ARTEFACT_BYTES:
            raise Problem(413, "oversize", f"{len(content)} bytes, at most {_MAX_ARTEFACT_BYTES}")
        _input_width(content)
        digest = hashlib.sha256(content).hexdigest()
        await store.add_artefact(digest, content)
        return {"sha256": digest, "bytes": len(content)}

    @api.post(
        "/models/{model}/versions",
        status_code=201,
        responses={200: {"description": "It was registered before"}, **failures(409)},
    )
    async def register(model: str, ask: VersionAsk, response: Response) -> dict[str, Any]:
        """Register a version: it is loaded and tried before anybody hears of it.

        The same version again is 200; other content under its number is 409.
        """
        version = ask.of(model)
        if not await registry.register(version):
            response.status_code = 200
        return version.record(0) | {"deployment": version.deployment}

    @api.put("/models/{model}/schedule")
    async def schedule(model: str, ask: list[ScheduleEntry]) -> dict[str, Any]:
        """Say which version answers from when on (event time); replaces the whole schedule."""
        versions = [version.version for version in await store.versions(model)]
        asked = [Champion(entry.version, _micros(entry.effective_at)) for entry in ask]
        entries = checked_schedule(asked, versions)
        if entries != await store.schedule(model):
            await store.set_schedule(model, entries, registry.clock.now_us())
        return {"model": model, "schedule": await registry.schedule(model)}


def _add_reads(api: APIRouter, registry: Registry) -> None:
    store = registry.store

    @api.get("/models")
    async def list_models() -> list[dict[str, Any]]:
        """Every model with its version numbers and schedule."""
        numbers: dict[str, list[int]] = {}
        for version in await store.versions():
            numbers.setdefault(version.model, []).append(version.version)
        return [
            {"model": model, "versions": known, "schedule": await registry.schedule(model)}
            for model, known in numbers.items()
        ]

    @api.get("/models/{model}/versions", responses=failures(404))
    async def list_versions(model: str) -> list[dict[str, Any]]:
        """A model's versions with their signatures."""
        versions = await store.versions(model)
        if not versions:
            raise Problem(404, "not_found", f"no model {model!r}")
        return [version.record(0) for version in versions]


def _micros(at: datetime) -> int:
    aware = at if at.tzinfo else at.replace(tzinfo=UTC)
    return round(aware.timestamp() * 1_000_000)


def _input_width(content: bytes) -> int | None:
    """The second dimension of the graph's first input; None when it is not fixed."""
    try:
        graph = onnx.load_from_string(content).graph
        shape = graph.input[0].type.tensor_type.shape.dim
    except Exception as error:
        raise Problem(422, "not_onnx", f"the body is no ONNX model: {error}"[:300]) from error
    return int(shape[1].dim_value) or None if len(shape) > 1 else None
