"""Spans of what begins or goes on outside a worker: API calls, outbox rows, work that gathers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from opentelemetry import context as current
from opentelemetry.trace import (
    INVALID_SPAN,
    Link,
    Span,
    SpanKind,
    Tracer,
    get_current_span,
)

from causemesh.errors import Misdeclared, Retryable
from causemesh.spans import LINKS, failures_on, parent_of, trace_ids, traceparent_of

Attributes = Mapping[str, str | int | Sequence[str]]
Trace = tuple[bytes, Mapping[str, str]]
"""A W3C context, and what to say of it on a link."""
Observe = Callable[[str, int, float, Mapping[str, str] | None], None]
_BUG = 500


def _status_of(error: Exception) -> int:
    """What the API answers; see `causemesh.admin.problems`."""
    if isinstance(error, Retryable):
        return 503
    status: int = getattr(error, "status", 422 if isinstance(error, Misdeclared) else _BUG)
    return status


def _sent(system: str, topic: str, count: int) -> Attributes:
    return {
        "messaging.system": system,
        "messaging.destination.name": topic,
        "messaging.operation.name": "send",
        "messaging.operation.type": "send",
        "messaging.batch.message_count": count,
    }


@dataclass
class Call:
    """A call of the API in progress; its route notes the status it answers with."""

    status: int = 200


class DoorSpans:
    """Continues a caller's trace, or makes a sampled root, for each call of the API.

    `observe` hears of every call, traced or not: route, status, seconds, and trace_id and span_id.
    """

    def __init__(
        self, tracer: Tracer | None, system: str, observe: Observe = lambda *_: None
    ) -> None:
        self._tracer = tracer
        self._system = system
        self._observe = observe

    @contextmanager
    def serving(self, method: str, route: str, incoming: str | None) -> Iterator[Call]:
        """A server span round a whole call."""
        call = Call()
        began = time.perf_counter()
        with self._serving(method, route, incoming) as span:
            try:
                yield call
            except Exception as error:
                call.status = _status_of(error)
                with failures_on([span] if call.status >= _BUG else []):
                    raise
            finally:
                span.set_attribute("http.response.status_code", call.status)
                self._observe(route, call.status, time.perf_counter() - began, trace_ids())

    @contextmanager
    def _serving(self, method: str, route: str, incoming: str | None) -> Iterator[Span]:
        parent = parent_of(incoming.encode() if incoming else None)
        if self._tracer is None:
            token = current.attach(parent)
            try:
                yield INVALID_SPAN
            finally:
                current.detach(token)
            return
        with self._tracer.start_as_current_span(
            f"{method} {route}",
            context=parent,
            kind=SpanKind.SERVER,
            attributes={
                "http.request.method": method,
                "http.route": route,
                "url.path": route,
                "url.scheme": "http",
            },
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            yield span

    @contextmanager
    def sending(self, topic: str, count: int) -> Iterator[bytes | None]:
        """A producer span in a call; gives the context to write beside the records, None if not
        sampled."""
        if self._tracer is None:
            yield traceparent_of(get_current_span())
            return
        with self._tracer.start_as_current_span(
            f"send {topic}",
            kind=SpanKind.PRODUCER,
            attributes=_sent(self._system, topic, count),
        ) as span:
            yield traceparent_of(span)


class OutboxSpans:
    """Goes on with the traces of outbox rows when they are sent."""

    def __init__(self, tracer: Tracer | None, system: str) -> None:
        self._tracer = tracer
        self._system = system

    @contextmanager
    def sending(self, rows: Mapping[int, tuple[str, bytes]]) -> Iterator[dict[int, bytes]]:
        """A producer span a traced row, which are (topic, context) by row number; gives the
        contexts to write beside the records."""
        if self._tracer is None:
            yield {number: context for number, (_, context) in rows.items()}
            return
        spans = {
            number: self._tracer.start_span(
                f"send {topic}",
                context=parent_of(context),
                kind=SpanKind.PRODUCER,
                attributes=_sent(self._system, topic, 1),
            )
            for number, (topic, context) in rows.items()
        }
        contexts = {number: traceparent_of(span) for number, span in spans.items()}
        try:
            with failures_on(list(spans.values())):
                yield {number: one for number, one in contexts.items() if one is not None}
        finally:
            for span in spans.values():
                span.end()


@contextmanager
def following(
    tracer: Tracer | None,
    name: str,
    traces: Sequence[Trace],
    attributes: Attributes,
    *,
    kind: SpanKind = SpanKind.INTERNAL,
) -> Iterator[bytes | None]:
    """A span round work that traced records led to; nothing when there are none.

    It is the child of the first and links to each that comes with attributes, 32 at most. Gives
    the context to go on with; without a tracer the first one as it came.
    """
    if tracer is None or not traces:
        yield traces[0][0] if traces else None
        return
    with (
        tracer.start_as_current_span(
            name,
            context=parent_of(traces[0][0]),
            kind=kind,
            attributes=attributes,
            links=_links(traces),
            record_exception=False,
            set_status_on_exception=False,
        ) as span,
        failures_on([span]),
    ):
        yield traceparent_of(span)


def _links(traces: Sequence[Trace]) -> list[Link]:
    return [
        Link(get_current_span(parent_of(context)).get_span_context(), about)
        for context, about in traces[:LINKS]
        if about
    ]
