"""Spans of API calls, outbox rows and gathered work; their names are OpenTelemetry's."""

from __future__ import annotations

import importlib
import pkgutil
from contextlib import suppress
from typing import Any

import opentelemetry.semconv._incubating.attributes as incubating
import opentelemetry.semconv.attributes as stable
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import SpanKind, StatusCode, Tracer, get_current_span
from prometheus_client.openmetrics import exposition as openmetrics

from causemesh.admin import Problem
from causemesh.errors import Misdeclared, Retryable
from causemesh.spans import trace_ids
from causemesh.spans_sending import DoorSpans, OutboxSpans, following
from causemesh.telemetry import Metrics

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
CALLER = "00f067aa0ba902b7"
CONTEXT = f"00-{TRACE}-{CALLER}-01"


class Traced:
    """A tracer and the spans that it ended."""

    def __init__(self, ratio: float = 1.0) -> None:
        self._exporter = InMemorySpanExporter()
        sampler = ParentBased(TraceIdRatioBased(ratio))
        provider = TracerProvider(sampler=sampler, shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracer: Tracer = provider.get_tracer("test")

    def spans(self) -> dict[str, ReadableSpan]:
        spans = self._exporter.get_finished_spans()
        assert len({span.name for span in spans}) == len(spans)
        return {span.name: span for span in spans}

    def attributes(self, name: str) -> dict[str, Any]:
        return dict(self.spans()[name].attributes or {})


def known_attributes() -> set[str]:
    """Every attribute that the installed semantic conventions define."""
    names: set[str] = set()
    for package in (stable, incubating):
        for module in pkgutil.iter_modules(package.__path__):
            found = vars(importlib.import_module(f"{package.__name__}.{module.name}"))
            names |= {one for name, one in found.items() if name.isupper() and type(one) is str}
    return names


def test_a_call_is_a_server_span_with_a_producer_span_a_topic() -> None:
    traced = Traced(ratio=0.0)
    door = DoorSpans(traced.tracer, "kafka")
    with door.serving("POST", "/v1/events", CONTEXT) as call:
        with door.sending("inbox.e", 3) as context:
            assert context is not None
        call.status = 202
    served, sent = traced.spans()["POST /v1/events"], traced.spans()["send inbox.e"]
    assert served.parent is not None
    assert f"{served.parent.span_id:016x}" == CALLER
    assert sent.parent == served.context
    assert (served.kind, sent.kind) == (SpanKind.SERVER, SpanKind.PRODUCER)
    assert context == f"00-{TRACE}-{sent.context.span_id:016x}-01".encode()
    assert traced.attributes("POST /v1/events") == {
        "http.request.method": "POST",
        "http.route": "/v1/events",
        "http.response.status_code": 202,
        "url.path": "/v1/events",
        "url.scheme": "http",
    }
    assert traced.attributes("send inbox.e") == {
        "messaging.system": "kafka",
        "messaging.destination.name": "inbox.e",
        "messaging.operation.name": "send",
        "messaging.operation.type": "send",
        "messaging.batch.message_count": 3,
    }


@pytest.mark.parametrize(
    ("ratio", "incoming", "sampled"),
    [
        (1.0, None, True),
        (0.0, None, False),
        (0.0, CONTEXT, True),
        (1.0, f"00-{TRACE}-{CALLER}-00", False),
        (0.0, "nonsense", False),
    ],
)
def test_the_ratio_is_for_roots_and_a_caller_decides_for_its_own(
    ratio: float, incoming: str | None, *, sampled: bool
) -> None:
    traced = Traced(ratio)
    door = DoorSpans(traced.tracer, "kafka")
    with door.serving("POST", "/x", incoming), door.sending("inbox.e", 1) as context:
        assert (context is not None) is sampled
        assert (trace_ids() is not None) is sampled
    assert len(traced.spans()) == (2 if sampled else 0)


@pytest.mark.parametrize(("incoming", "written"), [(CONTEXT, CONTEXT.encode()), (None, None)])
def test_without_a_tracer_a_call_hands_on_what_came(
    incoming: str | None, written: bytes | None
) -> None:
    door = DoorSpans(None, "kafka")
    with door.serving("POST", "/x", incoming) as call, door.sending("inbox.e", 1) as context:
        call.status = 202
    assert context == written
    assert not get_current_span().get_span_context().is_valid


@pytest.mark.parametrize(
    ("error", "code", "status"),
    [
        (Problem(422, "invalid", "no"), 422, StatusCode.UNSET),
        (Misdeclared("unknown reason"), 422, StatusCode.UNSET),
        (Problem(504, "expired", "late"), 504, StatusCode.ERROR),
        (Retryable("the broker is away"), 503, StatusCode.ERROR),
        (KeyError("bug"), 500, StatusCode.ERROR),
    ],
)
def test_a_refused_call_is_no_error_of_the_server(
    error: Exception, code: int, status: StatusCode
) -> None:
    traced = Traced()
    with suppress(type(error)), DoorSpans(traced.tracer, "kafka").serving("POST", "/x", None):
        raise error
    assert traced.spans()["POST /x"].status.status_code is status
    attributes = traced.attributes("POST /x")
    assert attributes["http.response.status_code"] == code
    assert ("error.type" in attributes) is (status is StatusCode.ERROR)


@pytest.mark.parametrize("exported", [True, False])
def test_every_call_is_timed_and_a_traced_one_named(*, exported: bool) -> None:
    metrics = Metrics()
    tracer = Traced(ratio=0.0).tracer if exported else None
    door = DoorSpans(tracer, "kafka", metrics.call_done)
    for incoming in (None, CONTEXT, None):
        with door.serving("POST", "/x", incoming) as call:
            call.status = 202
    with suppress(Problem), door.serving("POST", "/x", None):
        raise Problem(422, "invalid", "no")
    text = openmetrics.generate_latest(metrics.registry).decode()
    assert 'causemesh_request_seconds_count{route="/x",status="202"} 3.0' in text
    assert 'causemesh_request_seconds_count{route="/x",status="422"} 1.0' in text
    (exemplar,) = [line for line in text.splitlines() if "# {" in line]
    assert 'route="/x",status="202"' in exemplar
    assert f'trace_id="{TRACE}"' in exemplar


def test_outbox_rows_go_on_with_their_traces() -> None:
    traced = Traced()
    rows = {7: ("t.seven", CONTEXT.encode()), 9: ("t.nine", f"00-{TRACE}-{CALLER}-00".encode())}
    with OutboxSpans(traced.tracer, "kafka").sending(rows) as contexts:
        pass
    (sent,) = traced.spans().values()
    assert contexts == {7: f"00-{TRACE}-{sent.context.span_id:016x}-01".encode()}
    assert (sent.name, sent.kind) == ("send t.seven", SpanKind.PRODUCER)
    with OutboxSpans(None, "kafka").sending(rows) as contexts:
        pass
    assert contexts == {7: CONTEXT.encode(), 9: rows[9][1]}


def test_an_outbox_that_does_not_get_out_says_why() -> None:
    traced = Traced()
    rows = {7: ("t.seven", CONTEXT.encode())}
    with suppress(KeyError), OutboxSpans(traced.tracer, "kafka").sending(rows):
        raise KeyError("gone")
    assert traced.attributes("send t.seven")["error.type"] == "KeyError"


def test_gathered_work_is_a_child_of_one_trace_and_linked_to_all() -> None:
    traced = Traced(ratio=0.0)
    others = [f"00-{n:032x}-{n:016x}-01".encode() for n in range(1, 50)]
    traces = [(one, {"causemesh.meter": "m"}) for one in [CONTEXT.encode(), *others]]
    with following(traced.tracer, "close", traces, {"a": "b"}) as context:
        get_current_span().set_attribute("lines", ["x"])
    (span,) = traced.spans().values()
    assert context == f"00-{TRACE}-{span.context.span_id:016x}-01".encode()
    assert span.parent is not None
    assert f"{span.parent.span_id:016x}" == CALLER
    linked = [f"{link.context.trace_id:032x}" for link in span.links]
    assert linked == [TRACE, *(f"{n:032x}" for n in range(1, 32))]
    assert {dict(link.attributes or {})["causemesh.meter"] for link in span.links} == {"m"}
    assert traced.attributes("close") == {"a": "b", "lines": ("x",)}


def test_work_that_no_traced_record_led_to_has_no_span() -> None:
    traced = Traced()
    with following(traced.tracer, "close", [], {}) as context:
        assert trace_ids() is None
    assert context is None
    assert traced.spans() == {}
    with following(None, "close", [(CONTEXT.encode(), {})], {}) as context:
        pass
    assert context == CONTEXT.encode()


def test_attributes_are_those_of_the_semantic_conventions() -> None:
    """All but our own, which have our name; the control is a name that was replaced long ago."""
    traced = Traced()
    door = DoorSpans(traced.tracer, "kafka")
    with suppress(KeyError), door.serving("POST", "/x", None), door.sending("t", 1):
        raise KeyError
    used = {name for span in traced.spans().values() for name in span.attributes or {}}
    assert len(used) >= 10
    assert used - known_attributes() == set()
    assert {"messaging.destination", "messaging.kafka.partition"} - known_attributes() == {
        "messaging.destination",
        "messaging.kafka.partition",
    }
