"""The FastAPI application of one service."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Annotated

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from causemesh.admin.problems import RESPONSES, add_problem_handlers

Probe = Callable[[], Awaitable[Mapping[str, str]]]
"""Names what is not ready, and why; empty when all is."""

_bearer = HTTPBearer(auto_error=False, description="CAUSEMESH_API_TOKEN")


def create_app(
    service: str,
    token: str,
    registry: CollectorRegistry,
    probe: Probe,
    routers: Sequence[APIRouter] = (),
) -> FastAPI:
    """The service's API: /health, /ready and /metrics are open, /v1 asks for the bearer token."""

    async def authorised(
        given: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
    ) -> None:
        # As bytes: compare_digest refuses text that is not ASCII.
        if given is None or not hmac.compare_digest(given.credentials.encode(), token.encode()):
            raise HTTPException(
                401,
                "send the header Authorization: Bearer <CAUSEMESH_API_TOKEN>",
                {"WWW-Authenticate": "Bearer"},
            )

    app = FastAPI(title=f"Causemesh {service}", version=version("causemesh"))
    add_problem_handlers(app)
    app.include_router(_open_routes(service, registry, probe))
    for router in routers:
        app.include_router(
            router, prefix="/v1", dependencies=[Depends(authorised)], responses=RESPONSES
        )
    return app


def _open_routes(service: str, registry: CollectorRegistry, probe: Probe) -> APIRouter:
    routes = APIRouter(tags=["service"])

    @routes.get("/health")
    async def health() -> dict[str, str]:
        """Whether the process lives."""
        return {"service": service, "status": "ok"}

    @routes.get("/ready")
    async def ready(response: Response) -> dict[str, object]:
        """Whether it can do its work; 503 names what is missing."""
        missing = dict(await probe())
        response.status_code = 503 if missing else 200
        return {"service": service, "ready": not missing, "missing": missing}

    @routes.get("/metrics", response_class=Response)
    async def metrics(request: Request) -> Response:
        """Prometheus metrics; with exemplars where `Accept` asks for OpenMetrics."""
        encode, kind = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(registry), headers={"Content-Type": kind})

    return routes
