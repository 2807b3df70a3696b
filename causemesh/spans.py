"""OpenTelemetry spans of the records that carry a trace context; nothing for all others.

A record's context travels beside it on the bus (`RawBatch.traceparents`). A unit of work makes one
consumer span a traced record and hands its context to what that record causes. With no tracer the
contexts are passed on as they came, so that a service without an exporter breaks no trace.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

import numpy as np
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Link, Span, SpanKind, Status, StatusCode, Tracer, get_current_span
from opentelemetry.trace.propagation import set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from causemesh.bus.base import TRACEPARENT, TopicPartition

if TYPE_CHECKING:  # the worker imports this module
    from causemesh.runner.batch import Batch, Outgoing

_W3C = TraceContextTextMapPropagator()
_HELD = 1_000
_UNIT: ContextVar[tuple[Tracer, Sequence[Span]] | None] = ContextVar("unit", default=None)


def tracer_provider(service: str, endpoint: str, ratio: float) -> TracerProvider:
    """Exports to an OTLP/HTTP `endpoint`; roots are sampled by `ratio`, others as their parent.

    Call `shutdown` at the end: it sends what waits.
    """
    provider = TracerProvider(
        sampler=ParentBased(TraceIdRatioBased(ratio)),
        resource=Resource.create({"service.name": f"causemesh-{service}"}),
        shutdown_on_exit=False,
    )
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(f"{endpoint}/v1/traces")))
    return provider


def traceparent_of(span: Span) -> bytes | None:
    """The W3C context of a sampled span; None for any other."""
    if not span.get_span_context().trace_flags.sampled:
        return None
    carrier: dict[str, str] = {}
    _W3C.inject(carrier, set_span_in_context(span))
    return carrier[TRACEPARENT].encode()


class UnitSpans:
    """One worker's spans; `traces` are the contexts its outputs go on with.

    A stateful processor may emit in a later unit: the contexts of its records are held until
    something was emitted for them, at most 1,000, the oldest given up first.
    """

    def __init__(self, tracer: Tracer | None, system: str, group: str, *, hold: bool) -> None:
        self._tracer = tracer
        self._system = system
        self._group = group
        self._hold = hold
        self.traces: dict[TopicPartition, dict[int, bytes]] = {}

    @contextmanager
    def unit(self, batches: Sequence[Batch]) -> Iterator[None]:
        """Spans over one unit; an error that ends the unit is recorded on each."""
        traced = [batch for batch in batches if batch.raw.traceparents is not None]
        spans = [span for batch in traced for span in self._begin(batch)] if traced else []
        token = _UNIT.set((self._tracer, spans) if self._tracer and spans else None)
        try:
            yield
        except Exception as error:
            for span in spans:
                span.record_exception(error)
                span.set_status(Status(StatusCode.ERROR, str(error)))
            raise
        finally:
            _UNIT.reset(token)
            for span in spans:
                span.end()
            if self.traces and not self._hold:
                self.traces.clear()

    def emitted(self, outgoing: Sequence[Outgoing]) -> None:
        """Let go of the causes of what was emitted; a unit that may be repeated in place keeps
        them to its end."""
        for part in outgoing if self.traces and self._hold else ():
            source = (part.cause_topic, part.cause_partition)
            held = self.traces.get(source, {})
            for position in np.intersect1d(part.positions, list(held)).tolist():
                del held[int(position)]
            if not held:
                self.traces.pop(source, None)

    def _begin(self, batch: Batch) -> Iterator[Span]:
        contexts = batch.raw.traceparents or ()
        held = self.traces.setdefault((batch.topic, batch.partition), {})
        for row in sorted({*batch.rows.tolist(), *batch.bad}):
            context = contexts[row]
            if context is None:
                continue
            position = int(batch.raw.positions[row])
            if self._tracer is None:
                held[position] = context
            else:
                span = self._span(self._tracer, batch, position, context)
                own = traceparent_of(span)
                if own is not None:
                    held[position] = own
                yield span
            if len(held) > _HELD:
                del held[next(iter(held))]

    def _span(self, tracer: Tracer, batch: Batch, position: int, context: bytes) -> Span:
        place = "messaging.kafka.offset" if self._system == "kafka" else "causemesh.position"
        return tracer.start_span(
            f"process {batch.topic}",
            context=_W3C.extract({TRACEPARENT: context.decode("ascii", "replace")}),
            kind=SpanKind.CONSUMER,
            attributes={
                "messaging.system": self._system,
                "messaging.destination.name": batch.topic,
                "messaging.operation.type": "process",
                "messaging.consumer.group.name": self._group,
                "causemesh.partition": batch.partition,
                place: position,
            },
        )


@contextmanager
def calling(name: str, attributes: Mapping[str, str | int]) -> Iterator[None]:
    """A client span round a call for the unit in progress; nothing when no record is traced.

    One call serves many records: the span is the child of the first traced one and links to the
    others.
    """
    unit = _UNIT.get()
    if unit is None:
        yield
        return
    tracer, (first, *others) = unit
    with tracer.start_as_current_span(
        name,
        context=set_span_in_context(first),
        kind=SpanKind.CLIENT,
        attributes=attributes,
        links=[Link(other.get_span_context()) for other in others],
    ):
        yield


class DoorSpans:
    """Continues a caller's trace, or makes a sampled root, for each call of the API."""

    def __init__(self, tracer: Tracer | None, system: str) -> None:
        self._tracer = tracer
        self._system = system

    @contextmanager
    def sending(self, name: str, incoming: str | None) -> Iterator[bytes | None]:
        """A producer span; gives the context to write beside the records, None if not sampled."""
        parent = _W3C.extract({TRACEPARENT: incoming} if incoming else {})
        if self._tracer is None:
            yield traceparent_of(get_current_span(parent))
            return
        attributes = {"messaging.system": self._system, "messaging.operation.type": "send"}
        with self._tracer.start_as_current_span(
            name, context=parent, kind=SpanKind.PRODUCER, attributes=attributes
        ) as span:
            yield traceparent_of(span)
