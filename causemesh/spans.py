"""OpenTelemetry spans of the records that carry a trace context; nothing for all others.

A record's context travels beside it on the bus (`RawBatch.traceparents`). A unit of work makes one
consumer span a traced record and hands its context to what that record causes. With no tracer the
contexts are passed on as they came, so that a service without an exporter breaks no trace.

Names follow OpenTelemetry's semantic conventions for messaging and for generative AI.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from opentelemetry.context import Context
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

LINKS = 32
"""The most links of one span."""
_W3C = TraceContextTextMapPropagator()
_HELD = 1_000
_NOTHING: Mapping[int, bytes] = {}
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Unit:
    """The unit in progress: spans of its records, and the contexts that its outputs go on with."""

    tracer: Tracer | None
    spans: Mapping[TopicPartition, Mapping[int, Span]]
    traces: Mapping[TopicPartition, Mapping[int, bytes]]


_UNIT: ContextVar[_Unit | None] = ContextVar("unit", default=None)


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


def parent_of(traceparent: bytes | None) -> Context:
    """A W3C context as the parent of a span; of a root when there is none or it is malformed."""
    return _W3C.extract(
        {TRACEPARENT: traceparent.decode("ascii", "replace")} if traceparent else {}
    )


def traceparent_of(span: Span) -> bytes | None:
    """The W3C context of a sampled span; None for any other."""
    if not span.get_span_context().trace_flags.sampled:
        return None
    carrier: dict[str, str] = {}
    _W3C.inject(carrier, set_span_in_context(span))
    return carrier[TRACEPARENT].encode()


@contextmanager
def failures_on(spans: Sequence[Span]) -> Iterator[None]:
    """Record an error that passes by on each span."""
    try:
        yield
    except Exception as error:
        for span in spans:
            span.record_exception(error)
            span.set_status(Status(StatusCode.ERROR, str(error)))
            span.set_attribute("error.type", type(error).__qualname__)
        raise


class UnitSpans:
    """One worker's spans; `traces` are the contexts its outputs go on with.

    A stateful processor may emit in a later unit: the contexts of its records are held until
    something was emitted for them, at most 1,000, the oldest given up first. `exemplar` names a
    span of the last unit, for metrics; None when no record of it was traced.
    """

    def __init__(self, tracer: Tracer | None, system: str, group: str, *, hold: bool) -> None:
        self._tracer = tracer
        self._system = system
        self._group = group
        self._hold = hold
        self.traces: dict[TopicPartition, dict[int, bytes]] = {}
        self.exemplar: Mapping[str, str] | None = None

    @contextmanager
    def unit(self, batches: Sequence[Batch]) -> Iterator[None]:
        """Spans over one unit; an error that ends the unit is recorded on each."""
        traced = [batch for batch in batches if batch.raw.traceparents is not None]
        spans = {(one.topic, one.partition): self._begin(one) for one in traced}
        unit = _Unit(self._tracer, spans, self.traces) if self.traces else None
        begun = [span for of_source in spans.values() for span in of_source.values()]
        token = _UNIT.set(unit)
        self.exemplar = trace_ids() if begun else None
        try:
            with failures_on(begun):
                yield
        finally:
            _UNIT.reset(token)
            for span in begun:
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

    def _begin(self, batch: Batch) -> dict[int, Span]:
        """Spans of the batch's traced records by position, none without a tracer."""
        contexts = batch.raw.traceparents or ()
        held = self.traces.setdefault((batch.topic, batch.partition), {})
        begun: dict[int, Span] = {}
        rows = sorted({*batch.rows.tolist(), *batch.bad})
        for row in rows:
            context = contexts[row]
            if context is None:
                continue
            position = int(batch.raw.positions[row])
            going_on: bytes | None = context
            if self._tracer is not None:
                span = begun[position] = self._span(
                    self._tracer, batch, position, context, len(rows)
                )
                going_on = traceparent_of(span)
            if going_on is not None:
                held[position] = going_on
            if len(held) > _HELD:
                del held[next(iter(held))]
        return begun

    def _span(
        self, tracer: Tracer, batch: Batch, position: int, context: bytes, count: int
    ) -> Span:
        place = "messaging.kafka.offset" if self._system == "kafka" else "causemesh.position"
        return tracer.start_span(
            f"process {batch.topic}",
            context=parent_of(context),
            kind=SpanKind.CONSUMER,
            attributes={
                "messaging.system": self._system,
                "messaging.destination.name": batch.topic,
                "messaging.destination.partition.id": str(batch.partition),
                "messaging.operation.name": "process",
                "messaging.operation.type": "process",
                "messaging.consumer.group.name": self._group,
                "messaging.batch.message_count": count,
                place: position,
            },
        )


def traced_in(batch: Batch) -> Mapping[int, bytes]:
    """The context that each traced record of `batch` goes on with, by position; for a processor."""
    unit = _UNIT.get()
    if unit is None:
        return _NOTHING
    held = unit.traces.get((batch.topic, batch.partition), _NOTHING)
    return {at: held[at] for at in np.intersect1d(batch.positions, list(held)).tolist()}


def context_of(origin: tuple[str, int, int] | None) -> bytes | None:
    """The context that what (topic, partition, position) causes goes on with, in its unit."""
    unit = _UNIT.get()
    if unit is None or origin is None:
        return None
    return unit.traces.get(origin[:2], _NOTHING).get(origin[2])


def trace_ids() -> Mapping[str, str] | None:
    """`trace_id` and `span_id` of what is going on: the current span, else that of the unit's first
    traced record. None when nothing is traced."""
    context = traceparent_of(get_current_span())
    unit = _UNIT.get()
    if context is None and unit is not None:
        spans = (span for of_source in unit.spans.values() for span in of_source.values())
        context = next(filter(None, map(traceparent_of, spans)), None)
    if context is None:
        return None
    _, trace_id, span_id, _ = context.decode("ascii", "replace").split("-", 3)
    return {"trace_id": trace_id, "span_id": span_id}


@contextmanager
def calling(
    name: str, attributes: Mapping[str, str | int], batch: Batch, rows: Rows
) -> Iterator[None]:
    """A client span round a call for `rows` of a batch; nothing when none of them is traced.

    One call serves many records: the span is the child of the first traced one and links to the
    others, 32 at most.
    """
    unit = _UNIT.get()
    spans = _of_rows(unit, batch, rows) if unit is not None else []
    if unit is None or unit.tracer is None or not spans:
        yield
        return
    first, *others = spans
    with (
        unit.tracer.start_as_current_span(
            name,
            context=set_span_in_context(first),
            kind=SpanKind.CLIENT,
            attributes=attributes,
            links=[Link(other.get_span_context()) for other in others[:LINKS]],
            record_exception=False,
            set_status_on_exception=False,
        ) as span,
        failures_on([span]),
    ):
        yield


def _of_rows(unit: _Unit, batch: Batch, rows: Rows) -> list[Span]:
    spans = unit.spans.get((batch.topic, batch.partition), {})
    return [spans[at] for at in np.intersect1d(batch.positions[rows], list(spans)).tolist()]
