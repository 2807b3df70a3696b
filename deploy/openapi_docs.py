"""docs/openapi/<service>.json from the routes: `python -m deploy.openapi_docs docs/openapi`.

No service is started. Routes only keep what they are given until they are called, so they are made
on stand-ins for the connections.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path

from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from causemesh.admin import create_app
from causemesh.catalogue import SERVICES


class _Absent:
    """Stands for a connection that nobody uses: each of its parts is absent too."""

    def __getattr__(self, _: str) -> _Absent:
        return self

    def __iter__(self) -> Iterator[_Absent]:
        return iter(())


async def _nothing_missing() -> Mapping[str, str]:
    return {}


def application(service: str) -> FastAPI:
    """The admin API of `service`, to be read and not to be called."""
    routes = import_module(f"services.{service}.api").routes
    absent = {name: _Absent() for name in inspect.signature(routes).parameters}
    return create_app(service, "", CollectorRegistry(), _nothing_missing, [routes(**absent)])


def render(app: FastAPI) -> str:
    """The OpenAPI document of an API, sorted and indented."""
    return json.dumps(app.openapi(), indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def main(folder: Path) -> None:
    """Write the document of each service into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for service in SERVICES:
        (folder / f"{service}.json").write_text(render(application(service)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
