"""The stand-in over HTTP: who calls, which endpoint, under which key, with which fault."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path
from urllib.parse import parse_qsl

from fastapi import FastAPI, Request, Response
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from causemesh.clock import Clock, SystemClock
from causemesh.local.stripe import customers, invoiceitems, invoices, params
from causemesh.local.stripe.faults import Fault, Faults, broken, rate_limited
from causemesh.local.stripe.idempotency import Keyed, Keys, Outcome, keyed, replayed
from causemesh.local.stripe.operations import Call, Operation
from causemesh.local.stripe.refusals import Refused
from causemesh.local.stripe.serving import drop
from causemesh.local.stripe.store import Store

OPERATIONS = (*customers.OPERATIONS, *invoiceitems.OPERATIONS, *invoices.OPERATIONS)
_FORM = "application/x-www-form-urlencoded"


def create_app(
    data: Path, *, clock: Clock | None = None, idempotency: bool = True, faults: bool = False
) -> FastAPI:
    """The stand-in over the file `data`.

    `idempotency=False` ignores the keys: only for the control arms of tests. `faults` opens
    `/_faults` and `/_calls`.
    """
    store = Store(data)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        store.close()

    app = FastAPI(lifespan=lifespan, openapi_url=None)
    asked_for = Faults()
    desk = _Desk(store, clock or SystemClock(), idempotency, asked_for)
    for operation in OPERATIONS:
        app.add_api_route(operation.path, desk.endpoint(operation), methods=[operation.method])
    if faults:
        app.include_router(asked_for.routes())
    app.add_exception_handler(HTTPException, _unrecognised)
    return app


async def _unrecognised(request: Request, _error: Exception) -> Response:
    message = f"Unrecognized request URL ({request.method}: {request.url.path})."
    return _response(_refused(Refused(message, status=404)), _request_id())


class _Desk:
    """Answers calls."""

    def __init__(self, store: Store, clock: Clock, idempotency: bool, faults: Faults) -> None:
        self._store = store
        self._clock = clock
        self._idempotency = idempotency
        self._keys = Keys(store)
        self._faults = faults

    def endpoint(self, operation: Operation) -> Callable[[Request], Awaitable[Response]]:
        """The route of one operation."""

        async def answer(request: Request) -> Response:
            request_id = _request_id()
            fault = self._faults.take(operation)
            try:
                outcome = await self._answer(operation, request, fault, request_id)
            except Refused as refused:
                outcome = _refused(refused)
            if fault is not None and fault.next == "timeout_after_commit":
                await drop(request)
            self._faults.answers[_ending(outcome, fault)] += 1
            return _response(outcome, request_id)

        return answer

    async def _answer(
        self, operation: Operation, request: Request, fault: Fault | None, request_id: str
    ) -> Outcome:
        """What to answer. What is refused here ran nothing, so it is not kept under the key."""
        _authorise(request)
        sent = await _sent(request)
        call = Call(
            self._store,
            request.url.path,
            request.path_params.get("id", ""),
            params.check(sent, operation.params),
            self._clock.now_us() // 1_000_000,
        )
        if fault is not None and fault.next == 429:
            raise rate_limited()
        key = request.headers.get("idempotency-key") if operation.method == "POST" else None
        under = None
        if key and self._idempotency:
            under = keyed(key, request.url.path, sent, request_id)
        with self._keys.use(under.key) if under else nullcontext():
            if fault is not None and fault.next == "timeout_while_running":
                await drop(request)
            if fault is not None and fault.next in ("slow", "timeout_while_running"):
                await asyncio.sleep(fault.delay_ms / 1000)
            return await run_in_threadpool(self._perform, operation, call, under, fault)

    def _perform(
        self, operation: Operation, call: Call, under: Keyed | None, fault: Fault | None
    ) -> Outcome:
        """The effect and its kept answer, in one transaction."""
        now_us = self._clock.now_us()
        with self._store.transaction():
            if under is not None:
                kept = self._keys.recall(under, now_us)
                if kept is not None:
                    return replayed(kept)
            outcome = self._run(operation, call, fault)
            if under is not None:
                self._keys.save(under, outcome, now_us)
        return outcome

    def _run(self, operation: Operation, call: Call, fault: Fault | None) -> Outcome:
        breaks = fault.when if fault is not None and fault.next == 500 else None
        if breaks == "before":
            return _refused(broken())
        try:
            with self._store.effect():
                outcome = Outcome(200, json.dumps(operation.run(call)))
        except Refused as refused:
            return _refused(refused)
        return _refused(broken()) if breaks == "after" else outcome


def _authorise(request: Request) -> None:
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    if scheme != "Bearer" or not key.startswith("sk_test_"):
        raise Refused(
            "You did not provide an API key this stand-in takes: send "
            "'Authorization: Bearer sk_test_...', never a live key",
            status=401,
        )


async def _sent(request: Request) -> list[tuple[str, str]]:
    """The parameters: of the query for GET and DELETE, of the form for POST."""
    if request.method != "POST":
        return list(request.query_params.multi_items())
    body = await request.body()
    if body and not request.headers.get("content-type", "").startswith(_FORM):
        raise Refused(f"Send the parameters as {_FORM}")
    try:
        return parse_qsl(body.decode(), keep_blank_values=True, errors="strict")
    except UnicodeDecodeError as error:
        raise Refused("Send the parameters in UTF-8") from error


def _ending(outcome: Outcome, fault: Fault | None) -> str:
    """How a call ended for its caller, for the tests that count it."""
    if fault is not None and str(fault.next).startswith("timeout_"):
        return "dropped"
    return f"{outcome.status}{' replayed' if outcome.replay_of else ''}"


def _request_id() -> str:
    return f"req_{secrets.token_hex(7)}"


def _refused(refused: Refused) -> Outcome:
    return Outcome(refused.status, json.dumps(refused.body), headers=refused.headers)


def _response(outcome: Outcome, request_id: str) -> Response:
    headers = {**outcome.headers, "Request-Id": request_id}
    if outcome.status == 500:
        # As Stripe: the key would only replay it, so the library should not try again by itself.
        headers["Stripe-Should-Retry"] = "false"
    return Response(outcome.body, outcome.status, headers, media_type="application/json")
