"""The admin API that every service has, through HTTP without a socket."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

import httpx
import pytest
from fastapi import APIRouter, Depends, HTTPException
from prometheus_client import CollectorRegistry, Counter
from pydantic import BaseModel
from structlog.testing import capture_logs

from causemesh.admin import Page, PageParams, Problem, create_app, page_of
from causemesh.errors import Gone, Misdeclared, Retryable

TOKEN = "a-token-for-the-admin-test"
ITEMS = [(n // 3, f"i{n:03}") for n in range(101)]
AUTHORISED = {"Authorization": f"Bearer {TOKEN}"}


class Amount(BaseModel):
    amount_minor: int


def routes() -> APIRouter:
    router = APIRouter()

    @router.get("/items")
    async def items(page: Annotated[PageParams, Depends()]) -> Page[str]:
        after = None if page.after is None else tuple(page.after)
        found = [one for one in ITEMS if after is None or one > after][: page.limit + 1]
        shown = page_of(found, page.limit, key=list)
        return Page(items=[name for _, name in shown.items], next_cursor=shown.next_cursor)

    @router.post("/amounts")
    async def amounts(amount: Amount) -> Amount:
        return amount

    @router.get("/fails/{how}")
    async def fails(how: str) -> None:
        raise {
            "problem": Problem(409, "conflict", "someone was first", winner="ada"),
            "away": Retryable("the database is away", retry_after=2.6),
            "soon": Retryable("nearly there", retry_after=0.01),
            "gone": Gone("the log begins at 7"),
            "misdeclared": Misdeclared("topic 'x' is not in the catalogue"),
            "http": HTTPException(418, "a teapot"),
            "bug": KeyError("secret detail"),
        }[how]

    return router


def client(missing: Mapping[str, str] | None = None) -> httpx.AsyncClient:
    registry = CollectorRegistry()
    Counter("causemesh_seen", "Seen.", registry=registry).inc(3)

    async def probe() -> Mapping[str, str]:
        return missing or {}

    app = create_app("ingest", TOKEN, registry, probe, [routes()])
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://mesh")


async def ask(
    method: str, path: str, headers: Mapping[str, Any] = AUTHORISED, **more: Any
) -> httpx.Response:
    async with client() as api:
        return await api.request(method, path, headers=dict(headers), **more)


def problem(answer: httpx.Response, status: int, kind: str) -> dict[str, Any]:
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = answer.json()
    assert (body["type"], body["status"]) == (f"urn:causemesh:problem:{kind}", status)
    assert body["title"] == kind.replace("_", " ")
    assert body["detail"]
    return body


@pytest.mark.parametrize(
    ("how", "status", "kind"),
    [
        ("problem", 409, "conflict"),
        ("away", 503, "unavailable"),
        ("misdeclared", 422, "misdeclared"),
        ("gone", 410, "log_gone"),
        ("http", 418, "refused"),
        ("bug", 500, "internal"),
    ],
)
async def test_every_failure_is_a_problem(how: str, status: int, kind: str) -> None:
    with capture_logs() as logged:
        body = problem(await ask("GET", f"/v1/fails/{how}"), status, kind)
    assert "secret" not in json.dumps(body)
    assert [line["event"] for line in logged] == ["request_failed"] * (how == "bug")


async def test_a_problem_carries_its_extra_members() -> None:
    assert (await ask("GET", "/v1/fails/problem")).json()["winner"] == "ada"


@pytest.mark.parametrize(("how", "seconds"), [("away", "3"), ("soon", "1")])
async def test_what_is_away_says_when_to_come_back(how: str, seconds: str) -> None:
    assert (await ask("GET", f"/v1/fails/{how}")).headers["retry-after"] == seconds


async def test_routes_that_are_not_there() -> None:
    problem(await ask("GET", "/v1/nowhere"), 404, "not_found")
    refused = await ask("DELETE", "/v1/items")
    problem(refused, 405, "method_not_allowed")
    assert refused.headers["allow"] == "GET"


@pytest.mark.parametrize("content", ['{"amount_minor": "much"}', "{}", "{broken", "[]", ""])
async def test_an_invalid_body_names_its_fields(content: str) -> None:
    body = problem(await ask("POST", "/v1/amounts", content=content), 422, "invalid")
    assert all(error["field"].startswith("body") for error in body["errors"])
    assert body["errors"][0]["field"] in body["detail"]


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": f"Bearer {TOKEN}x"},
        {"Authorization": f"Basic {TOKEN}"},
        {"Authorization": "Bearer "},
        {"Authorization": "Bearer tökén".encode("latin-1")},
    ],
)
async def test_without_the_token_nothing_under_v1_answers(headers: dict[str, Any]) -> None:
    for path in ("/v1/items", "/v1/fails/bug"):
        refused = await ask("GET", path, headers)
        assert "CAUSEMESH_API_TOKEN" in problem(refused, 401, "unauthorised")["detail"]
        assert refused.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("limit", [3, 50, 100, 101, 500])
async def test_pages_cover_everything_once_and_in_order(limit: int) -> None:
    seen: list[str] = []
    cursor = None
    async with client() as api:
        while True:
            parameters = {"limit": limit} | ({} if cursor is None else {"cursor": cursor})
            page = (await api.get("/v1/items", params=parameters, headers=AUTHORISED)).json()
            assert 0 < len(page["items"]) <= limit
            seen += page["items"]
            cursor = page["next_cursor"]
            if cursor is None:
                break
    assert seen == [name for _, name in ITEMS]


@pytest.mark.parametrize("given", ["not a cursor", "!!!", "e30", "_w=="])
async def test_a_cursor_that_is_none_of_ours_is_refused(given: str) -> None:
    problem(await ask("GET", "/v1/items", params={"cursor": given}), 422, "invalid_cursor")


@pytest.mark.parametrize("limit", ["0", "501", "many"])
async def test_a_limit_out_of_bounds_is_refused(limit: str) -> None:
    body = problem(await ask("GET", "/v1/items", params={"limit": limit}), 422, "invalid")
    assert body["errors"][0]["field"] == "query.limit"


async def test_health_metrics_and_readiness_are_open() -> None:
    async with client() as api:
        assert (await api.get("/health")).json() == {"service": "ingest", "status": "ok"}
        ready = await api.get("/ready")
        assert (ready.status_code, ready.json()["missing"]) == (200, {})
        metrics = await api.get("/metrics")
    assert metrics.headers["content-type"].startswith("text/plain")
    assert "causemesh_seen_total 3.0" in metrics.text


@pytest.mark.parametrize(
    ("accept", "kind", "ends"),
    [
        ("application/openmetrics-text;version=1.0.0,text/plain;q=0.3", "application/open", True),
        ("text/plain", "text/plain", False),
        ("*/*", "text/plain", False),
    ],
)
async def test_metrics_come_as_they_are_asked_for(accept: str, kind: str, *, ends: bool) -> None:
    async with client() as api:
        metrics = await api.get("/metrics", headers={"Accept": accept})
    assert metrics.headers["content-type"].startswith(kind)
    assert metrics.text.endswith("# EOF\n") is ends


async def test_what_is_missing_is_named_with_503() -> None:
    async with client({"features": "owns no partition yet"}) as api:
        answer = await api.get("/ready")
    assert answer.status_code == 503
    assert answer.json()["missing"] == {"features": "owns no partition yet"}
    assert answer.json()["ready"] is False
