"""The admin API of ingest: events and predictions over REST, rejects and their replay."""

from __future__ import annotations

import asyncio
import json
import math
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from causemesh.admin import Problem, failures
from causemesh.bus.base import Producer
from causemesh.client import REQUESTS, Client
from causemesh.codec.rows import RowEncoder
from causemesh.errors import Misdeclared
from causemesh.log import LogReader
from causemesh.spans_sending import DoorSpans
from services.ingest.domain import MAX_VALUE_BYTES, REASONS
from services.ingest.rejects import RejectFilter, Rejects
from services.ingest.replies import PREDICTIONS, Replies, Reply
from services.ingest.settings import IngestSettings

_NOT_BLANK = r"\S"


class CloudEvent(BaseModel):
    """A CloudEvents 1.0 event in JSON; `tenantid` is an extension attribute."""

    model_config = ConfigDict(extra="ignore")

    specversion: Literal["1.0"]
    id: str = Field(pattern=_NOT_BLANK)
    source: str = Field(min_length=1)
    type: str = Field(min_length=1, description="The event type, as in the project's catalogue.")
    tenantid: str = Field(pattern=_NOT_BLANK)
    time: datetime | None = None
    data: dict[str, Any]

    def row(self) -> dict[str, Any]:
        """The event as a row of its inbox record."""
        envelope = {
            "event_id": self.id,
            "tenant_id": self.tenantid,
            "occurred_at": self.time or datetime.now(UTC),
        }
        return {**self.data, **envelope}


class PredictionAsk(BaseModel):
    """A prediction request. `request_id` makes a retry safe; without one an id is made."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    tenant_id: str = Field(pattern=_NOT_BLANK)
    model: str = Field(min_length=1)
    version: int | None = None
    entities: dict[str, str | None] = Field(default_factory=dict)
    inputs: dict[str, float | None] = Field(default_factory=dict)
    request_id: str = Field(default_factory=lambda: str(uuid.uuid4()), pattern=_NOT_BLANK)
    occurred_at: datetime | None = None
    mode: Literal["live", "replay"] = "live"
    expires_at: datetime | None = None

    def row(self) -> dict[str, Any]:
        """The request as a row of inbox.requests."""
        return {
            "event_id": self.request_id,
            "tenant_id": self.tenant_id,
            "occurred_at": self.occurred_at or datetime.now(UTC),
            "model": self.model,
            "version": self.version,
            "entities": [{"name": k, "value": v} for k, v in self.entities.items()],
            "inputs": [{"name": k, "value": v} for k, v in self.inputs.items()],
            "mode": self.mode,
            "expires_at": self.expires_at,
        }


class ReplayAsk(BaseModel):
    """Which rejects to send through the door again; no filter means all."""

    model_config = ConfigDict(extra="forbid")

    reason: str | None = None
    tenant_id: str | None = None
    event_ids: list[str] | None = None
    dry_run: bool = False


class Accepted(BaseModel):
    """How many records were written."""

    accepted: int


_OUTCOME_STATUS = {"failed": 422, "expired": 504, "shed": 429}


def routes(
    client: Client,
    replies: Replies,
    log: LogReader,
    producer: Producer,
    settings: IngestSettings,
    *,
    spans: DoorSpans,
) -> APIRouter:
    """All routes, bound to their connections."""
    api = APIRouter()
    rejects = Rejects(log, client.catalogue, producer)

    async def send(ask: PredictionAsk) -> None:
        with spans.sending(REQUESTS, 1) as context:
            await _send(client, ask, context)

    async def answer(ask: PredictionAsk, wait_ms: int) -> dict[str, Any] | None:
        """The outcome; None when it is not there in time."""
        if wait_ms == 0:
            await send(ask)
            return None
        outcome = replies.expect(ask.tenant_id, ask.request_id)
        try:
            await send(ask)
            return _outcome(await asyncio.wait_for(outcome, wait_ms / 1000))
        except TimeoutError:
            return None
        finally:
            outcome.cancel()

    @api.post("/events", status_code=202, tags=["events"], responses=failures(413))
    async def produce_events(
        request: Request, traceparent: Annotated[str | None, Header()] = None
    ) -> Accepted:
        """Write CloudEvents: one, or a list (application/cloudevents-batch+json).

        All or none: one invalid event refuses the call and says which one and why.
        """
        with spans.serving("POST", "/v1/events", traceparent) as call:
            events = _parsed(await request.body(), settings.max_events_per_call)
            for kind, part in _checked(client, events).items():
                with spans.sending(f"inbox.{kind}", len(part)) as context:
                    await client.produce(kind, part, traceparent=context)
            call.status = 202
        return Accepted(accepted=len(events))

    @api.post(
        "/predictions",
        tags=["predictions"],
        responses={202: {"description": "Accepted; the outcome is not here yet"}, **failures(413)},
    )
    async def predict(
        ask: PredictionAsk,
        response: Response,
        wait_ms: Annotated[int, Query(ge=0, le=30_000)] = 5_000,
        prefer: Annotated[str | None, Header()] = None,
        traceparent: Annotated[str | None, Header()] = None,
    ) -> dict[str, Any]:
        """Ask for a prediction and wait for its outcome.

        With `Prefer: respond-async`, or when the outcome takes longer than `wait_ms`, the answer
        is 202 with the request id; the outcome is on inference.predictions.v1 in any case.
        """
        with spans.serving("POST", "/v1/predictions", traceparent) as call:
            found = await answer(ask, 0 if prefer == "respond-async" else wait_ms)
            response.status_code = call.status = 202 if found is None else 200
        return found or {"request_id": ask.request_id, "outcome": None}

    @api.get("/rejects", tags=["rejects"])
    async def list_rejects(
        reason: str | None = None,
        tenant_id: str | None = None,
        limit: Annotated[int, Query(ge=1, le=500)] = 50,
    ) -> list[dict[str, Any]]:
        """The newest rejects, newest first; the original bytes in base64."""
        return await rejects.newest(RejectFilter(_known(reason), tenant_id), limit)

    @api.post("/rejects/replay", tags=["rejects"])
    async def replay_rejects(ask: ReplayAsk) -> dict[str, int]:
        """Write the original bytes of rejects to their inbox topics again."""
        ids = None if ask.event_ids is None else frozenset(ask.event_ids)
        chosen = RejectFilter(_known(ask.reason), ask.tenant_id, ids)
        return {"replayed": await rejects.replay(chosen, dry_run=ask.dry_run)}

    return api


def _parsed(body: bytes, limit: int) -> list[CloudEvent]:
    try:
        document = json.loads(body)
    except ValueError:
        raise Problem(422, "invalid", "the body is not JSON") from None
    documents = document if isinstance(document, list) else [document]
    if len(documents) > limit:
        raise Problem(413, "oversize", f"{len(documents)} events in one call, at most {limit}")
    events, errors = [], []
    for number, one in enumerate(documents):
        try:
            events.append(CloudEvent.model_validate(one))
        except ValueError as error:
            errors.append({"index": number, "message": str(error)})
    if errors:
        raise Problem(422, "invalid", f"{len(errors)} events are no CloudEvents", errors=errors)
    return events


def _checked(client: Client, events: list[CloudEvent]) -> dict[str, list[dict[str, Any]]]:
    """Rows by event type. Raises Problem naming every event that does not fit."""
    rows: dict[str, list[dict[str, Any]]] = {}
    encoders = {
        kind.name: _encoder(client, kind.inbox) for kind in client.catalogue.event_types.values()
    }
    refused: dict[int, Problem] = {}
    for number, event in enumerate(events):
        row = event.row()
        try:
            if event.type not in encoders:
                known = sorted(encoders)
                raise Problem(422, "invalid", f"unknown type {event.type!r}: {known}")
            _check(encoders[event.type], row, row)
        except Problem as problem:
            refused[number] = problem
        else:
            rows.setdefault(event.type, []).append(row)
    if refused:
        first = next(iter(refused.values()))
        errors = [{"index": at, "message": one.detail} for at, one in refused.items()]
        raise Problem(first.status, first.kind, first.detail, errors=errors)
    return rows


def _encoder(client: Client, topic: str) -> RowEncoder:
    return RowEncoder(client.catalogue.topic(topic).record, 0)


def _check(encoder: RowEncoder, row: dict[str, Any], numbers: Mapping[str, Any]) -> None:
    """Raise Problem for a row that does not fit, or whose record the door would refuse anyway."""
    try:
        size = len(encoder.encode(row))
    except ValueError as error:
        raise Problem(422, "invalid", str(error)) from error
    if size > MAX_VALUE_BYTES:
        raise Problem(413, "oversize", f"a record of {size} bytes, at most {MAX_VALUE_BYTES}")
    for name, value in numbers.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise Problem(422, "not_a_number", f"{name}: {REASONS['not_a_number']}")


async def _send(client: Client, ask: PredictionAsk, context: bytes | None) -> None:
    row = ask.row()
    _check(_encoder(client, REQUESTS), row, ask.inputs)
    await client.request([row], traceparent=context)


def _outcome(reply: Reply) -> dict[str, Any]:
    row = reply.row
    if reply.topic != PREDICTIONS:
        status = 409 if row["reason"] == "duplicate" else 422
        raise Problem(status, row["reason"], row["detail"], request_id=row["claimed_id"])
    named = ("request_id", "model", "version", "outcome", "score", "reason", "compute_ms")
    answer = {name: row[name] for name in named}
    if row["outcome"] != "predicted":
        kind, _, detail = (row["reason"] or row["outcome"]).partition(":")
        raise Problem(_OUTCOME_STATUS[row["outcome"]], kind, detail.strip() or kind, **answer)
    return answer


def _known(reason: str | None) -> str | None:
    if reason is not None and reason not in REASONS:
        raise Misdeclared(f"unknown reason {reason!r}; known: {sorted(REASONS)}")
    return reason
