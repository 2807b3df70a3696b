"""One trace over every hop: each stage's span is the child of the span before it."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import Sequence
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import SpanKind, StatusCode

from causemesh.bus.base import Outbound
from causemesh.bus.memory import MemoryBus, no_step
from causemesh.clock import SystemClock
from causemesh.errors import Fatal
from causemesh.positions import MemoryPositionStore
from causemesh.runner import Batch, Emitter, Limits, PartitionWorker, Stage, UnitReport
from causemesh.spans import UnitSpans, calling, context_of, trace_ids, traced_in

from .topology import PARTITIONS, Door, Join, PickleCodec, Sink, catalogue, fill, make_source

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
CALLER = "00f067aa0ba902b7"
CONTEXT = f"00-{TRACE}-{CALLER}-01"
CATALOGUE = catalogue()
STAGES = (
    (Stage("door", "door.e", ("inbox.e",), ("events.e",)), Door),
    (Stage("door", "door.r", ("inbox.r",), ("requests",)), Door),
    (Stage("join", "join", ("events.e", "requests"), ("answers",)), Join),
    (Stage("sink", "sink", ("answers",)), Sink),
)


class Mesh:
    """Three hops on the memory bus; `drops` is the control arm, a bus that loses the header."""

    def __init__(self, *, ratio: float = 1.0, drops: bool = False, off: bool = False) -> None:
        self.exporter = InMemorySpanExporter()
        sampler = ParentBased(TraceIdRatioBased(ratio))
        provider = TracerProvider(sampler=sampler, shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracer = None if off else provider.get_tracer("test")
        self.bus = MemoryBus()
        self.producer: Any = Dropping(self.bus) if drops else self.bus.producer("p")
        self.observer: Any = None

    async def run(self, context: str | None, processors: dict[str, Any] | None = None) -> None:
        rng = random.Random(5)
        sources = {
            (topic, number): make_source(rng, topic, number, 9)
            for topic in ("inbox.e", "inbox.r")
            for number in range(PARTITIONS)
        }
        await fill(self.bus, sources)
        if context is not None:
            row = next(n for n, key in enumerate(self.bus.log("inbox.r", 0).keys) if key)
            self.bus.log("inbox.r", 0).traceparents[row] = context.encode()
        store = MemoryPositionStore(no_step)
        for stage, processor in STAGES:
            made = (processors or {}).get(stage.group, processor)
            workers = [self.worker(stage, n, made(), store) for n in range(PARTITIONS)]
            await asyncio.gather(*map(self.finish, workers))

    def worker(self, stage: Stage, partition: int, made: Any, store: Any) -> PartitionWorker:
        return PartitionWorker(
            stage,
            partition,
            made,
            bus=self.bus,
            store=store,
            catalogue=CATALOGUE,
            decoder=PickleCodec(),
            emitter=Emitter(CATALOGUE, PickleCodec(), self.producer, stage.writes),
            clock=SystemClock(),
            limits=Limits(max_records=3, max_wait_s=0.001),
            observer=self.observer,
            spans=UnitSpans(self.tracer, "memory", stage.group, hold=made.stateful),
        )

    async def finish(self, worker: PartitionWorker) -> None:
        """Run a worker to the ends of its inputs."""
        running = asyncio.create_task(worker.run())
        for _ in range(5_000):
            ends = {source: len(self.bus.log(*source).values) - 1 for source in worker.positions}
            if running.done() or worker.positions == ends:
                break
            await asyncio.sleep(0.002)
        worker.stopping = True
        await running

    def spans(self) -> Sequence[ReadableSpan]:
        return self.exporter.get_finished_spans()

    def edges(self) -> set[tuple[str, str]]:
        names = {span.context.span_id: span.name for span in self.spans()}
        names[int(CALLER, 16)] = "caller"
        return {(names[span.parent.span_id], span.name) for span in self.spans() if span.parent}


class Dropping:
    def __init__(self, bus: MemoryBus) -> None:
        self._inner = bus.producer("p")

    async def send(self, outbound: Sequence[Outbound]) -> None:
        await self._inner.send([dataclasses.replace(part, traceparents=None) for part in outbound])


async def test_a_request_is_one_trace_over_all_hops() -> None:
    mesh = Mesh()
    await mesh.run(CONTEXT)
    assert mesh.edges() == {
        ("caller", "process inbox.r"),
        ("process inbox.r", "process requests"),
        ("process requests", "process answers"),
    }
    assert len(mesh.spans()) == 3
    assert {f"{span.context.trace_id:032x}" for span in mesh.spans()} == {TRACE}
    first = dict(mesh.spans()[0].attributes or {})
    assert first["messaging.system"] == "memory"
    assert first["messaging.destination.name"] == "inbox.r"
    assert first["messaging.operation.name"] == first["messaging.operation.type"] == "process"
    assert first["messaging.consumer.group.name"] == "door.r"
    assert first["messaging.destination.partition.id"] == "0"
    assert first["messaging.batch.message_count"] == 2  # the watermark is no message
    assert first["causemesh.position"] == 0
    assert {span.kind for span in mesh.spans()} == {SpanKind.CONSUMER}


async def test_a_bus_that_drops_the_context_breaks_the_edges() -> None:
    mesh = Mesh(drops=True)
    await mesh.run(CONTEXT)
    assert mesh.edges() == {("caller", "process inbox.r")}


@pytest.mark.parametrize("context", [None, f"00-{TRACE}-{CALLER}-00", "nonsense"])
async def test_nothing_is_made_for_untraced_records(
    context: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    mesh = Mesh(ratio=0.0)
    if context is None:
        monkeypatch.setattr(UnitSpans, "_begin", None)  # not even called
    await mesh.run(context)
    assert mesh.spans() == ()
    logs = [log for (topic, _), log in mesh.bus.logs.items() if not topic.startswith("inbox")]
    assert sum(len(log.values) for log in logs) > 20
    assert not any(any(log.traceparents) for log in logs)


async def test_without_an_exporter_the_context_goes_on_as_it_came() -> None:
    mesh = Mesh(off=True)
    await mesh.run(CONTEXT)
    logs = [log for (topic, _), log in mesh.bus.logs.items() if topic == "answers"]
    assert [one for log in logs for one in log.traceparents if one] == [CONTEXT.encode()]


async def test_an_error_is_recorded_on_the_spans_of_its_unit() -> None:
    class Failing(Sink):
        async def process(self, *_: Any) -> Any:
            raise Fatal("no more")

    mesh = Mesh()
    with pytest.raises(Fatal, match="no more"):
        await mesh.run(CONTEXT, {"door.r": Failing})
    (span,) = mesh.spans()
    assert span.status.status_code is StatusCode.ERROR
    assert span.events[0].name == "exception"
    assert (span.attributes or {})["error.type"] == "Fatal"


def test_held_contexts_are_bounded() -> None:
    mesh = Mesh()
    spans = UnitSpans(mesh.tracer, "memory", "g", hold=True)
    many = 1_500
    raw = SimpleNamespace(traceparents=[CONTEXT.encode()] * many, positions=np.arange(many))
    batch: Any = SimpleNamespace(topic="t", partition=0, rows=np.arange(many), bad={}, raw=raw)
    with spans.unit([batch]):
        pass
    held = spans.traces[("t", 0)]
    assert (len(held), min(held)) == (1_000, 500)


def traced_batch(contexts: list[bytes | None], topic: str = "t") -> Any:
    count = len(contexts)
    raw = SimpleNamespace(traceparents=contexts, positions=np.arange(count) + 10)
    at = {"rows": np.arange(count), "positions": raw.positions, "bad": {}}
    return SimpleNamespace(topic=topic, partition=0, raw=raw, **at)


def test_a_call_is_the_child_of_one_record_and_links_to_the_others() -> None:
    mesh = Mesh()
    spans = UnitSpans(mesh.tracer, "memory", "g", hold=False)
    batch = traced_batch([CONTEXT.encode(), None, CONTEXT.encode()])
    rows = np.arange(3)
    with calling("before", {}, batch, rows), spans.unit([batch]), calling("call", {}, batch, rows):
        pass
    assert mesh.edges() == {("caller", "process t"), ("process t", "call")}
    first, *others = [span for span in mesh.spans() if span.name == "process t"]
    (call,) = [span for span in mesh.spans() if span.name == "call"]
    assert call.kind is SpanKind.CLIENT
    assert call.parent == first.context
    assert [link.context for link in call.links] == [one.context for one in others]


def test_a_call_knows_only_its_own_records() -> None:
    """Records of the unit that another call serves, and of another batch, are no part of it."""
    mesh = Mesh()
    spans = UnitSpans(mesh.tracer, "memory", "g", hold=False)
    batch, other = traced_batch([CONTEXT.encode()] * 6), traced_batch([CONTEXT.encode()] * 2, "u")
    calls = {"even": [0, 2, 4], "odd": [1, 3], "none": []}
    with spans.unit([batch, other]):
        for name, rows in calls.items():
            with calling(name, {}, batch, np.array(rows, dtype=np.int64)):
                pass
    at = {
        span.context.span_id: (span.attributes or {})["causemesh.position"]
        for span in mesh.spans()
        if span.name == "process t"
    }
    found = {
        span.name: [
            at[one.span_id] for one in (span.parent, *(link.context for link in span.links))
        ]
        for span in mesh.spans()
        if span.name in calls and span.parent
    }
    assert found == {"even": [10, 12, 14], "odd": [11, 13]}


def test_links_are_bounded() -> None:
    mesh = Mesh()
    spans = UnitSpans(mesh.tracer, "memory", "g", hold=False)
    batch = traced_batch([CONTEXT.encode()] * 50)
    with spans.unit([batch]), calling("call", {}, batch, np.arange(50)):
        pass
    (call,) = [span for span in mesh.spans() if span.name == "call"]
    assert len(call.links) == 32


def test_a_call_that_fails_says_so() -> None:
    mesh = Mesh()
    spans = UnitSpans(mesh.tracer, "memory", "g", hold=False)
    batch = traced_batch([CONTEXT.encode()])
    with spans.unit([batch]), suppress(KeyError), calling("call", {}, batch, np.arange(1)):
        raise KeyError("x")
    (call,) = [span for span in mesh.spans() if span.name == "call"]
    assert (call.status.status_code, (call.attributes or {})["error.type"]) == (
        StatusCode.ERROR,
        "KeyError",
    )
    assert [event.name for event in call.events] == ["exception"]


@pytest.mark.parametrize("off", [False, True])
def test_a_processor_learns_the_contexts_of_its_unit(*, off: bool) -> None:
    """With a tracer those of the unit's spans, without one those that came."""
    mesh = Mesh(off=off)
    spans = UnitSpans(mesh.tracer, "memory", "g", hold=False)
    batch = traced_batch([None, CONTEXT.encode()])
    with spans.unit([batch]):
        (position, context), *more = traced_in(batch).items()
        assert context_of(("t", 0, 11)) == context
        for nowhere in (None, ("t", 0, 10), ("t", 1, 11), ("u", 0, 11)):
            assert context_of(nowhere) is None
    assert (position, more) == (11, [])
    assert TRACE.encode() in context
    assert (context == CONTEXT.encode()) is off
    if not off:
        (span,) = mesh.spans()
        assert f"{span.context.span_id:016x}".encode() in context
    assert traced_in(batch) == {}
    assert context_of(("t", 0, 11)) is None


def test_a_unit_is_named_by_its_own_records_not_by_those_that_are_held() -> None:
    mesh = Mesh()
    spans = UnitSpans(mesh.tracer, "memory", "g", hold=True)
    for topic in ("earlier", "later"):
        with spans.unit([traced_batch([CONTEXT.encode()], topic)]):
            ids = trace_ids()
        (span,) = [span for span in mesh.spans() if span.name == f"process {topic}"]
        assert (
            ids
            == spans.exemplar
            == {
                "trace_id": TRACE,
                "span_id": f"{span.context.span_id:016x}",
            }
        )
    with spans.unit([]):
        assert trace_ids() is None
        assert context_of(("earlier", 0, 10)) is not None  # it may be emitted for now
    assert spans.exemplar is None


async def test_units_tell_metrics_and_logs_of_their_traces() -> None:
    """An exemplar and the ids on log lines name the unit's span; other units have neither."""
    told: list[tuple[str, Any]] = []
    logged: list[tuple[str, Any]] = []

    class Telling(Sink):
        async def process(self, batches: Sequence[Batch], *rest: Any) -> Any:
            if batches:
                logged.append((batches[0].topic, trace_ids()))
            return await super().process(batches, *rest)

    class Observing:
        def unit_done(self, stage: Stage, partition: int, report: UnitReport) -> None:
            told.append((stage.group, report.exemplar))

    mesh = Mesh()
    mesh.observer = Observing()
    await mesh.run(CONTEXT, {"sink": Telling})
    (span,) = [span for span in mesh.spans() if span.name == "process answers"]
    ids = {"trace_id": TRACE, "span_id": f"{span.context.span_id:016x}"}
    exemplars = [exemplar for group, exemplar in told if group == "sink"]
    assert len(exemplars) > 1
    assert [one for one in exemplars if one] == [ids]
    assert [one for _, one in logged if one] == [ids]
    assert trace_ids() is None
