"""Schema registries: Confluent's HTTP API, and one in memory for tests."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any, Protocol
from urllib.parse import quote

import httpx

from causemesh.errors import MeshError, Misdeclared, Retryable

Schema = Mapping[str, Any]
_ATTEMPTS = 6
_FIRST_WAIT_S = 0.2


class UnknownSchema(MeshError):
    """No schema has this id at the registry."""


class Registry(Protocol):
    """Schemas by id and subject."""

    async def register(self, subject: str, schema: Schema) -> int:
        """The id of `schema` under `subject`. Raises Misdeclared when it is not compatible."""

    async def schema(self, schema_id: int) -> dict[str, Any]:
        """The schema with this id. Raises UnknownSchema."""

    async def set_compatibility(self, subject: str, level: str) -> None:
        """Set a subject's compatibility level, such as FULL_TRANSITIVE."""


class MemoryRegistry:
    """A registry for tests; it checks nothing."""

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}
        self._schemas: dict[int, dict[str, Any]] = {}
        self.levels: dict[str, str] = {}

    async def register(self, subject: str, schema: Schema) -> int:
        """See `Registry.register`."""
        text = json.dumps(schema, sort_keys=True)
        schema_id = self._ids.setdefault(text, len(self._ids) + 1)
        self._schemas[schema_id] = dict(schema)
        return schema_id

    async def schema(self, schema_id: int) -> dict[str, Any]:
        """See `Registry.schema`."""
        try:
            return self._schemas[schema_id]
        except KeyError:
            raise UnknownSchema(f"schema id {schema_id} is unknown") from None

    async def set_compatibility(self, subject: str, level: str) -> None:
        """See `Registry.set_compatibility`."""
        self.levels[subject] = level


class HttpRegistry:
    """A registry that speaks Confluent's API (Apicurio at /apis/ccompat/v7).

    Schemas are immutable under their id, so they are kept for good; an unknown id is asked again.
    """

    def __init__(self, base_url: str, *, timeout_s: float = 10.0) -> None:
        self._client = httpx.AsyncClient(base_url=base_url.rstrip("/"), timeout=timeout_s)
        self._schemas: dict[int, dict[str, Any]] = {}

    async def register(self, subject: str, schema: Schema) -> int:
        """See `Registry.register`."""
        body = {"schemaType": "AVRO", "schema": json.dumps(schema)}
        answer = await self._ask("POST", f"/subjects/{quote(subject, safe='')}/versions", body)
        if answer.status_code in (409, 422):
            raise Misdeclared(f"{subject}: the registry refuses this schema: {answer.text[:500]}")
        return int(self._checked(answer)["id"])

    async def schema(self, schema_id: int) -> dict[str, Any]:
        """See `Registry.schema`."""
        known = self._schemas.get(schema_id)
        if known is not None:
            return known
        answer = await self._ask("GET", f"/schemas/ids/{schema_id}", None)
        if answer.status_code == 404:
            raise UnknownSchema(f"schema id {schema_id} is unknown")
        schema: dict[str, Any] = json.loads(self._checked(answer)["schema"])
        self._schemas[schema_id] = schema
        return schema

    async def set_compatibility(self, subject: str, level: str) -> None:
        """See `Registry.set_compatibility`."""
        path = f"/config/{quote(subject, safe='')}"
        self._checked(await self._ask("PUT", path, {"compatibility": level}))

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def _ask(self, method: str, path: str, body: Any) -> httpx.Response:
        failure = ""
        for attempt in range(_ATTEMPTS):
            if attempt:
                await asyncio.sleep(_FIRST_WAIT_S * 2 ** (attempt - 1))
            try:
                answer = await self._client.request(method, path, json=body)
            except httpx.TransportError as error:
                failure = repr(error)
                continue
            if answer.status_code < 500:
                return answer
            failure = f"{answer.status_code} {answer.text[:200]}"
        raise Retryable(f"the schema registry does not answer: {failure}", retry_after=1.0)

    @staticmethod
    def _checked(answer: httpx.Response) -> Any:
        if answer.is_error:
            raise Misdeclared(
                f"the schema registry answered {answer.status_code} to {answer.request.url.path}:"
                f" {answer.text[:500]}"
            )
        return answer.json()
