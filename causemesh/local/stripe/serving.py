"""The HTTP server, which can also drop a connection without an answer."""

from __future__ import annotations

import asyncio
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from uvicorn.protocols.http.h11_impl import H11Protocol

from causemesh.errors import Misdeclared

HOST = "127.0.0.1"
_DROP = "causemesh.drop"


class _DroppingProtocol(H11Protocol):
    """Hands the application a way to abort its connection, which ASGI has none for."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        app = self.app

        async def with_drop(scope: Any, receive: Any, send: Any) -> None:
            extensions = {**scope.get("extensions", {}), _DROP: transport.abort}
            await app({**scope, "extensions": extensions}, receive, send)

        self.app = with_drop


def make_server(app: FastAPI, port: int, host: str = HOST) -> uvicorn.Server:
    """A server of the stand-in, not yet running; other machines reach it only on another `host`."""
    config = uvicorn.Config(
        app, host=host, port=port, http=_DroppingProtocol, ws="none", access_log=False
    )
    return uvicorn.Server(config)


async def drop(request: Request) -> None:
    """Abort the request's connection; returns when it is gone. What is answered then is lost."""
    abort = request.scope.get("extensions", {}).get(_DROP)
    if abort is None:
        raise Misdeclared("only a server from causemesh.local.stripe.make_server drops connections")
    abort()
    while (await request.receive())["type"] != "http.disconnect":
        pass
