"""Errors as application/problem+json (RFC 9457)."""

from __future__ import annotations

from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from causemesh.errors import Gone, Misdeclared, Retryable

_log = structlog.get_logger(__name__)
_MEDIA_TYPE = "application/problem+json"


class ProblemAnswer(BaseModel):
    """The body of every failure (RFC 9457); some kinds have more members."""

    type: str
    title: str
    status: int
    detail: str


def _described(about: str) -> dict[str, Any]:
    schema = ProblemAnswer.model_json_schema()
    return {"description": about, "content": {_MEDIA_TYPE: {"schema": schema}}}


RESPONSES: dict[int | str, dict[str, Any]] = {
    401: _described("No bearer token, or another one"),
    422: _described("The request does not fit; the detail says what to change"),
    503: _described("Something that the service needs is away; see Retry-After"),
}
"""The failures that any route may answer with, for OpenAPI."""


_ABOUT = {
    404: "There is no such thing",
    409: "It is not in a state for that",
    410: "The log no longer holds it",
    413: "The body is too large",
    421: "Another instance of the service holds it",
}


def failures(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The failures of a route beside those that any may answer with, for OpenAPI."""
    return {status: _described(_ABOUT[status]) for status in statuses}


class Problem(Exception):
    """An expected failure of a request.

    `kind` is the code of the problem (a code of docs/bad-input.md where one fits); `extra` are more
    members of the answer.
    """

    def __init__(self, status: int, kind: str, detail: str, **extra: Any) -> None:
        super().__init__(detail)
        self.status = status
        self.kind = kind
        self.detail = detail
        self.extra = extra


def _answer(
    status: int, kind: str, detail: str, extra: dict[str, Any], headers: dict[str, str]
) -> JSONResponse:
    body = {
        "type": f"urn:causemesh:problem:{kind}",
        "title": kind.replace("_", " "),
        "status": status,
        "detail": detail,
        **extra,
    }
    return JSONResponse(body, status, headers, media_type=_MEDIA_TYPE)


async def _problem(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, Problem)
    return _answer(error.status, error.kind, error.detail, error.extra, {})


async def _http(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    kind = {401: "unauthorised", 404: "not_found", 405: "method_not_allowed"}
    headers = dict(error.headers or {})
    code = kind.get(error.status_code, "refused")
    return _answer(error.status_code, code, str(error.detail), {}, headers)


async def _invalid(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    errors = [
        {"field": ".".join(map(str, one["loc"])), "message": one["msg"]} for one in error.errors()
    ]
    detail = "; ".join(f"{one['field']}: {one['message']}" for one in errors[:3])
    return _answer(422, "invalid", detail, {"errors": errors}, {})


async def _away(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, Retryable)
    headers = {"Retry-After": str(max(1, round(error.retry_after)))}
    return _answer(503, "unavailable", str(error), {}, headers)


async def _refused(_: Request, error: Exception) -> JSONResponse:
    return _answer(422, "misdeclared", str(error), {}, {})


async def _gone(_: Request, error: Exception) -> JSONResponse:
    return _answer(410, "log_gone", str(error), {}, {})


async def _bug(request: Request, error: Exception) -> JSONResponse:
    _log.error("request_failed", path=request.url.path, exc_info=error)
    return _answer(500, "internal", "an unexpected error; the log has its trace", {}, {})


def add_problem_handlers(app: FastAPI) -> None:
    """Answer every failure as problem+json."""
    app.add_exception_handler(Problem, _problem)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(Retryable, _away)
    app.add_exception_handler(Misdeclared, _refused)
    app.add_exception_handler(Gone, _gone)
    app.add_exception_handler(Exception, _bug)
