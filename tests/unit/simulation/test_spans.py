"""One trace over every hop: each stage's span is the child of the span before it."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import StatusCode

from causemesh.bus.base import Outbound
from causemesh.bus.memory import MemoryBus, no_step
from causemesh.clock import SystemClock
from causemesh.errors import Fatal
from causemesh.positions import MemoryPositionStore
from causemesh.runner import Emitter, Limits, PartitionWorker, Stage
from causemesh.spans import DoorSpans, UnitSpans, calling

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
        self.answers: list[Any] = []

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
    assert first["messaging.operation.type"] == "process"
    assert (first["causemesh.partition"], first["causemesh.position"]) == (0, 0)


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


@pytest.mark.parametrize(("ratio", "sampled"), [(1.0, True), (0.0, False)])
def test_the_door_makes_sampled_roots(ratio: float, *, sampled: bool) -> None:
    mesh = Mesh(ratio=ratio)
    with DoorSpans(mesh.tracer, "memory").sending("send", None) as context:
        assert (context is not None) is sampled
    assert len(mesh.spans()) == sampled


def test_the_door_continues_the_callers_trace() -> None:
    mesh = Mesh(ratio=0.0)
    with DoorSpans(mesh.tracer, "memory").sending("send", CONTEXT) as context:
        assert context is not None
        assert TRACE.encode() in context
    assert mesh.edges() == {("caller", "send")}


def test_a_call_is_the_child_of_one_record_and_links_to_the_others() -> None:
    mesh = Mesh()
    spans = UnitSpans(mesh.tracer, "memory", "g", hold=False)
    contexts = [CONTEXT.encode(), None, CONTEXT.encode()]
    raw = SimpleNamespace(traceparents=contexts, positions=np.arange(3))
    batch: Any = SimpleNamespace(topic="t", partition=0, rows=np.arange(3), bad={}, raw=raw)
    with calling("before", {}), spans.unit([batch]), calling("infer", {}):
        pass
    assert mesh.edges() == {("caller", "process t"), ("process t", "infer")}
    first, *others = [span for span in mesh.spans() if span.name == "process t"]
    (call,) = [span for span in mesh.spans() if span.name == "infer"]
    assert call.parent == first.context
    assert [link.context for link in call.links] == [one.context for one in others]
