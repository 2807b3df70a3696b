"""Whatever is sent to an admin API, it answers as its OpenAPI document says, and never fails.

The six services run as one mesh of their own: what is made up here must not reach other tests.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from causemesh.catalogue import SERVICES
from causemesh.local import Cluster
from causemesh.local.mesh import Mesh
from causemesh.local.ports import choose_ports
from causemesh.settings import API_PORTS

ROOT = Path(__file__).parents[3]
_HOME = Path(os.environ.get("CAUSEMESH_TEST_HOME", ".causemesh-test") + "-apis")
_EXAMPLES = int(os.environ.get("CAUSEMESH_FUZZ_EXAMPLES", "10"))
_CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]


@pytest.fixture(scope="module")
def apis() -> Iterator[Mesh]:
    """All six services with their servers."""
    cluster = Cluster(_HOME, ("kafka", "registry", "postgres", "triton"))
    endpoints = cluster.up()
    choose_ports(_HOME / "service-ports.json", dict.fromkeys(API_PORTS, 0))
    mesh = Mesh(_HOME, endpoints, ROOT / "tests" / "project")
    try:
        mesh.up()
        yield mesh
    finally:
        mesh.down()
        cluster.down()


def document(service: str) -> dict[str, Any]:
    """What a service says of its API."""
    said: dict[str, Any] = json.loads((ROOT / "docs" / "openapi" / f"{service}.json").read_text())
    return said


def operations(service: str, said: dict[str, Any]) -> Iterator[Any]:
    """The operations of a document, to be asked of the service."""
    for found in schemathesis.openapi.from_dict(said).get_all_operations():
        yield pytest.param(service, found.ok(), id=f"{service} {found.ok().label}")


def fuzz(service: str, operation: schemathesis.APIOperation, apis: Mesh) -> None:
    """Ask for `operation` with made-up parameters and bodies that its document allows."""
    headers = {"Authorization": f"Bearer {apis.token}"}

    @settings(
        max_examples=_EXAMPLES,
        deadline=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
        database=None,
        derandomize=True,
    )
    @given(operation.as_strategy())
    def ask(case: schemathesis.Case) -> None:
        case.call_and_validate(
            base_url=apis.url(service), headers=headers, checks=_CHECKS, timeout=30
        )

    ask()


@pytest.mark.servers
@pytest.mark.parametrize(
    ("service", "operation"),
    [one for service in SERVICES for one in operations(service, document(service))],
)
def test_an_api_answers_as_it_says(
    service: str, operation: schemathesis.APIOperation, apis: Mesh
) -> None:
    fuzz(service, operation, apis)


@pytest.mark.servers
def test_an_answer_that_is_not_in_the_document_is_found(apis: Mesh) -> None:
    said = document("billing")
    path = "/v1/invoices/{invoice_id}"
    del said["paths"][path]["get"]["responses"]["404"]
    said["paths"] = {path: {"get": said["paths"][path]["get"]}}
    (one,) = operations("billing", said)
    with pytest.raises(FailureGroup, match="Undocumented status code"):
        fuzz(*one.values, apis)
