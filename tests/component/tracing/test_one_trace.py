"""A request from the door to its invoice line, as a collector sees it: real services and servers.

The services export by OTLP/HTTP with a ratio of 0, so only what a caller traces has spans.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx
import pytest
import yaml
from onnx import TensorProto, helper

from causemesh.bus.base import Bus
from causemesh.bus.opening import open_bus
from causemesh.catalogue import Catalogue
from causemesh.client import Client
from causemesh.codec.registry import HttpRegistry
from causemesh.errors import Retryable
from causemesh.local import Cluster, Endpoints
from causemesh.local.mesh import Mesh
from causemesh.local.ports import choose_ports
from causemesh.settings import API_PORTS, BusName, ServiceSettings
from tests.component.tracing.receiver import Received, Receiver, receiving
from tests.unit.kit.test_spans_sending import known_attributes

pytestmark = [pytest.mark.servers, pytest.mark.timeout(600)]
HOME = Path(".causemesh-test-tracing")
ROOT = Path(__file__).parents[3]
SERVERS = ("registry", "postgres", "triton", "stripe")
SERVICES = ("ingest", "features", "inference", "billing")
EVENT, REQUEST, CALLER = "e" * 32, "f" * 32, "00f067aa0ba902b7"
UNSAMPLED = "d" * 32
PORTS = (
    *("kafka", "kafka_controller", "pulsar", "pulsar_web", "pulsar_bookie", "postgres"),
    *("registry", "registry_management", "triton", "triton_metrics", "stripe"),
)
OFFSET = {"kafka": "messaging.kafka.offset", "pulsar": "causemesh.position"}
"""The attribute that says where a record lies."""
BILLING = {
    "currency": "usd",
    "grace_hours": 6,
    "meters": {
        "predictions": {"topic": "inference.predictions.v1", "aggregation": "count"},
        "readings": {"topic": "events.reading", "aggregation": "count"},
    },
    "plans": {
        "standard": {
            "base_fee": "1.00",
            "prices": {
                name: {"included": 0, "tiers": [{"unit": "0.5"}]}
                for name in ("predictions", "readings")
            },
        }
    },
    "tenants": {"default": "standard"},
}
Edge = tuple[str, str, str]
"""Parent, child, and the child's kind; spans are `service: name`."""


def project(folder: Path) -> Path:
    """Readings and requests whose event time the test moves, one view, two meters."""
    (folder / "events").mkdir(parents=True)
    shutil.copy(ROOT / "tests/project/events/Reading.avsc", folder / "events")
    shutil.copy(ROOT / "tests/project/features.yaml", folder)
    kinds = {"reading": {"record": "Reading", "key": "sensor", "watermark": "source"}}
    catalogue = {"event_types": kinds, "requests": {"watermark": "source"}}
    (folder / "catalogue.yaml").write_text(yaml.safe_dump(catalogue))
    (folder / "billing.yaml").write_text(yaml.safe_dump(BILLING))
    return folder


def model() -> bytes:
    """score = the only input."""
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "one"], ["score"])],
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 1])],
        [helper.make_tensor_value_info("score", TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(np.ones(1, np.float32), "one")],
    )
    opset = helper.make_opsetid("", 17)
    return bytes(helper.make_model(graph, opset_imports=[opset], ir_version=8).SerializeToString())


async def until(condition: Any, timeout_s: float = 60) -> Any:
    """The first true answer of `condition`."""
    async with asyncio.timeout(timeout_s):
        while not (answer := await condition()):  # noqa: ASYNC110 - polls other processes
            await asyncio.sleep(0.1)
    return answer


@pytest.fixture(scope="module", params=["kafka", "pulsar"])
def broker(request: pytest.FixtureRequest) -> BusName:
    found: BusName = request.param
    return found


@pytest.fixture(scope="module")
def receiver(broker: BusName) -> Iterator[Receiver]:
    with receiving() as made:
        yield made


@pytest.fixture(scope="module")
def mesh(
    broker: BusName, receiver: Receiver, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Mesh]:
    """Servers and services of their own: event time and months are this test's alone."""
    shutil.rmtree(HOME, ignore_errors=True)
    HOME.mkdir()
    choose_ports(HOME / "ports.json", dict.fromkeys(PORTS, 0))
    choose_ports(HOME / "service-ports.json", dict.fromkeys(API_PORTS, 0))
    servers = Cluster(HOME, [broker, *SERVERS])
    try:
        endpoints = servers.up()
        folder = project(tmp_path_factory.mktemp("tracing") / "project")
        asyncio.run(create_topics(endpoints, broker, folder))
        made = Mesh(HOME, endpoints, folder, SERVICES)
        made.extra = {
            "CAUSEMESH_BUS": broker,
            "CAUSEMESH_OTLP_ENDPOINT": receiver.url,
            "CAUSEMESH_TRACE_RATIO": "0",
            "CAUSEMESH_CLOSE_POLL_S": "0.2",
            "CAUSEMESH_PUSH_POLL_S": "0.1",
            "OTEL_BSP_SCHEDULE_DELAY": "100",
        }
        try:
            made.up()
            yield made
        finally:
            made.down()
    finally:
        servers.down()


def bus_of(endpoints: Endpoints, broker: BusName) -> Bus:
    return open_bus(
        ServiceSettings(
            bus=broker,
            kafka_bootstrap=endpoints.kafka_bootstrap,
            pulsar_url=endpoints.pulsar_url,
            pulsar_admin_url=endpoints.pulsar_admin_url,
        )
    )


async def create_topics(endpoints: Endpoints, broker: BusName, folder: Path) -> None:
    """Before the services start: a member that joins while topics are made is assigned none."""
    catalogue = Catalogue.load([folder])
    admin = bus_of(endpoints, broker).admin()
    await admin.ensure(list(catalogue.topics.values()))

    async def told() -> bool:
        try:
            return bool(await admin.ends(list(catalogue.topics)))
        except Retryable:
            return False

    await until(told)
    await admin.close()


class Caller:
    """A user of the mesh who traces some of what they do."""

    def __init__(self, mesh: Mesh, broker: BusName, receiver: Receiver) -> None:
        headers = {"Authorization": f"Bearer {mesh.token}"}
        self.receiver = receiver
        self.api = {
            name: httpx.AsyncClient(base_url=mesh.url(name), headers=headers, timeout=30)
            for name in SERVICES
        }
        environment = mesh.environment()
        self.bus = bus_of(Cluster(mesh.home).endpoints, broker)
        self.registry = HttpRegistry(environment["CAUSEMESH_REGISTRY_URL"])
        self.producer = self.bus.producer("caller")
        catalogue = Catalogue.load([Path(environment["CAUSEMESH_PROJECT"])])
        self.client = Client(catalogue, self.registry, self.producer)

    async def close(self) -> None:
        for api in self.api.values():
            await api.aclose()
        await self.producer.close()
        await self.registry.close()
        await self.bus.close()

    async def call(self, service: str, method: str, path: str, **more: Any) -> Any:
        answer = await self.api[service].request(method, f"/v1{path}", **more)
        assert answer.is_success, answer.text
        return answer.json()

    async def event(self, number: int, traceparent: str | None = None) -> None:
        body = {
            "specversion": "1.0",
            "id": f"reading-{number}",
            "source": "test",
            "type": "reading",
            "tenantid": "acme",
            "time": "2013-01-05T00:00:00Z",
            "data": {"sensor": "s1", "site": None, "value": 1.0},
        }
        headers = {"traceparent": traceparent} if traceparent else {}
        await self.call("ingest", "POST", "/events", json=body, headers=headers)

    async def predict(self, number: int, traceparent: str | None = None) -> float:
        body = {
            "request_id": f"request-{number}",
            "tenant_id": "acme",
            "model": "m",
            "version": 1,
            "entities": {"sensor": "s1"},
            "inputs": {"row": float(number)},
            "occurred_at": "2013-01-06T00:00:00Z",
        }
        headers = {"traceparent": traceparent} if traceparent else {}
        path = "/predictions?wait_ms=20000"
        answer = await self.call("ingest", "POST", path, json=body, headers=headers)
        return float(answer["score"])

    async def register(self) -> None:
        digest = (await self.call("inference", "PUT", "/artefacts", content=model()))["sha256"]
        inputs = ["input.row"]
        body = {"version": 1, "artefact_sha256": digest, "features": inputs, "required": inputs}
        await self.call("inference", "POST", "/models/m/versions", json=body)

        async def known() -> bool:
            partitions = await self.call("features", "GET", "/models")
            return len(partitions) == 4 and all(
                "m@1" in one["versions"] for one in partitions.values()
            )

        await until(known)

    async def seen(self, trace_id: str, service: str, name: str, count: int = 1) -> list[Received]:
        """Spans of a trace by service and name, once there are so many."""

        async def found() -> list[Received]:
            spans = [
                one
                for one in self.receiver.of(trace_id)
                if (one.service, one.name) == (service, name)
            ]
            return spans if len(spans) >= count else []

        found_spans: list[Received] = await until(found)
        return found_spans

    async def promise(self, month: int) -> None:
        """Event time passes the start of a month of 2013 and the grace."""
        at = datetime(2013, month, 1, 7, tzinfo=UTC)
        for kind in ("reading", "requests"):
            await self.client.watermark(kind, at)

    async def invoice(self) -> dict[str, Any]:
        """The tenant's invoice, finalised, with its lines."""

        async def finalised() -> list[dict[str, Any]]:
            page = await self.call("billing", "GET", "/invoices?status=finalised")
            return list(page["items"])

        (head,) = await until(finalised)
        made: dict[str, Any] = await self.call("billing", "GET", f"/invoices/{head['invoice_id']}")
        return made


@dataclass(frozen=True)
class Told:
    """What there was to see once it was over."""

    spans: list[Received]
    invoice: dict[str, Any]
    metrics: str

    def of(self, trace_id: str) -> list[Received]:
        return [span for span in self.spans if span.trace_id == trace_id]

    def one(self, trace_id: str, service: str, name: str) -> Received:
        (found,) = [
            span for span in self.of(trace_id) if (span.service, span.name) == (service, name)
        ]
        return found


async def story(mesh: Mesh, broker: BusName, receiver: Receiver) -> Told:
    """Traced and untraced calls, then the month's invoice."""
    caller = Caller(mesh, broker, receiver)
    await caller.register()
    await caller.event(1, f"00-{EVENT}-{CALLER}-01")
    # The tenant is met by a traced record, so that telling its entitlement is part of the trace.
    await caller.seen(EVENT, "billing", "send billing.entitlements.v1")
    for number in range(2, 12):
        await caller.event(number)
        assert await caller.predict(number) == number
    await caller.event(12, f"00-{UNSAMPLED}-{CALLER}-00")
    assert await caller.predict(1, f"00-{REQUEST}-{CALLER}-01") == 1
    await caller.seen(REQUEST, "billing", "process inference.predictions.v1")
    await caller.promise(2)
    invoice = await caller.invoice()
    await caller.seen(REQUEST, "billing", "send billing.invoices.v1", 2)
    openmetrics = {"Accept": "application/openmetrics-text;version=1.0.0"}
    metrics = (await caller.api["inference"].get("/metrics", headers=openmetrics)).text
    await caller.close()
    return Told(list(receiver.spans), invoice, metrics)


@pytest.fixture(scope="module")
def told(mesh: Mesh, broker: BusName, receiver: Receiver) -> Told:
    return asyncio.run(story(mesh, broker, receiver))


def edges(spans: list[Received]) -> set[Edge]:
    names = {span.span_id: f"{span.service}: {span.name}" for span in spans}
    names[CALLER] = "caller"
    return {(names[span.parent_id], f"{span.service}: {span.name}", span.kind) for span in spans}


def test_an_event_is_one_trace_from_the_door_to_its_meters(told: Told) -> None:
    door, inbox = "ingest: POST /v1/events", "ingest: process inbox.reading"
    assert edges(told.of(EVENT)) == {
        ("caller", door, "SERVER"),
        (door, "ingest: send inbox.reading", "PRODUCER"),
        ("ingest: send inbox.reading", inbox, "CONSUMER"),
        (inbox, "features: process events.reading", "CONSUMER"),
        ("features: process events.reading", "features: process features.inputs.v1", "CONSUMER"),
        (inbox, "billing: process events.reading", "CONSUMER"),
        ("billing: process events.reading", "billing: send billing.entitlements.v1", "PRODUCER"),
    }


def test_a_request_is_one_trace_from_the_door_to_its_invoice(told: Told) -> None:
    door, inbox = "ingest: POST /v1/predictions", "ingest: process inbox.requests"
    features = "features: process inference.requests.v1"
    inference = "inference: process inference.tasks.realtime.v1"
    billing = "billing: process inference.predictions.v1"
    closing, pushing = "billing: close invoice", "billing: push invoice"
    told_on = "billing: send billing.invoices.v1"
    assert edges(told.of(REQUEST)) == {
        ("caller", door, "SERVER"),
        (door, "ingest: send inbox.requests", "PRODUCER"),
        ("ingest: send inbox.requests", inbox, "CONSUMER"),
        (inbox, features, "CONSUMER"),
        (features, inference, "CONSUMER"),
        (inference, "inference: predict m.v1", "CLIENT"),
        (inference, billing, "CONSUMER"),
        (billing, closing, "INTERNAL"),
        (closing, told_on, "PRODUCER"),
        (closing, pushing, "CLIENT"),
        (pushing, told_on, "PRODUCER"),
    }


def test_an_invoice_links_the_usage_of_its_lines(told: Told) -> None:
    """The event's trace, too: the invoice is the child of one and linked to all."""
    closing = told.one(REQUEST, "billing", "close invoice")
    usage = {
        "predictions": told.one(REQUEST, "billing", "process inference.predictions.v1"),
        "readings": told.one(EVENT, "billing", "process events.reading"),
    }
    assert sorted(closing.links, key=lambda link: link[2]["causemesh.meter"]) == [
        (
            span.trace_id,
            span.span_id,
            {"causemesh.meter": meter, "causemesh.usage_period": "2013-01"},
        )
        for meter, span in usage.items()
    ]
    assert closing.attributes["causemesh.invoice_id"] == told.invoice["invoice_id"]
    of_meters = [line for line in told.invoice["lines"] if line["meter"] in usage]
    assert {line["meter"]: line["quantity"] for line in of_meters} == {
        "predictions": 11.0,
        "readings": 12.0,
    }
    assert sorted(closing.attributes["causemesh.line_ids"]) == sorted(
        line["line_id"] for line in of_meters
    )


def test_what_no_caller_traces_has_no_span(told: Told, receiver: Receiver) -> None:
    """At a ratio of 0: ten events and requests without a context, one with an unsampled one."""
    assert {span.trace_id for span in told.spans} == {EVENT, REQUEST}
    assert receiver.refused == []
    assert len({span.span_id for span in told.spans}) == len(told.spans)


def test_attributes_are_those_of_the_semantic_conventions(told: Told, broker: BusName) -> None:
    used = {name for span in told.spans for name in span.attributes}
    assert {
        name for name in used - known_attributes() if not name.startswith("causemesh.")
    } == set()
    task = told.one(REQUEST, "inference", "process inference.tasks.realtime.v1").attributes
    assert isinstance(task.pop(OFFSET[broker]), int)
    assert task.pop("messaging.destination.partition.id") in {"0", "1", "2", "3"}
    assert task == {
        "messaging.system": broker,
        "messaging.destination.name": "inference.tasks.realtime.v1",
        "messaging.operation.name": "process",
        "messaging.operation.type": "process",
        "messaging.consumer.group.name": "inference-realtime",
        "messaging.batch.message_count": 1,
    }
    assert told.one(REQUEST, "inference", "predict m.v1").attributes == {
        "gen_ai.operation.name": "predict",
        "gen_ai.provider.name": "triton",
        "gen_ai.request.model": "m.v1",
        "causemesh.rows": 1,
    }
    assert told.one(REQUEST, "ingest", "POST /v1/predictions").attributes == {
        "http.request.method": "POST",
        "http.route": "/v1/predictions",
        "http.response.status_code": 200,
        "url.path": "/v1/predictions",
        "url.scheme": "http",
    }


def test_latency_names_the_trace_as_its_exemplar(told: Told) -> None:
    task = told.one(REQUEST, "inference", "process inference.tasks.realtime.v1")
    exemplars = [line for line in told.metrics.splitlines() if "# {" in line]
    assert exemplars
    assert all(line.startswith("causemesh_unit_seconds_bucket") for line in exemplars)
    assert any(
        f'trace_id="{REQUEST}"' in line and f'span_id="{task.span_id}"' in line
        for line in exemplars
    )
