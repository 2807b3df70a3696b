"""The processor of tasks against a model server of its own: bad rows stand alone, no row twice."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind

from causemesh.bus.base import RawBatch
from causemesh.clock import SystemClock
from causemesh.errors import Retryable
from causemesh.runner import Batch
from causemesh.spans import UnitSpans
from services.inference.deployments import Deployments
from services.inference.domain import ModelVersion
from services.inference.gateways import ModelError, NotLoaded
from services.inference.handlers import Predict

TASKS = "inference.tasks.realtime.v1"


class Store:
    """Version 1 of models m and n, one column wide."""

    async def version(self, model: str, version: int) -> ModelVersion | None:
        if model not in {"m", "n"} or version != 1:
            return None
        return ModelVersion(model, version, "realtime", ("input.x",), (), "sha", None, [], {})

    async def artefact(self, sha256: str) -> bytes | None:
        return b"onnx"


class Server:
    """score = x; refuses a call with a negative x in it."""

    def __init__(self) -> None:
        self.loaded: set[str] = set()
        self.loads = 0
        self.away = False
        self.calls: list[list[float]] = []

    async def load(self, name: str, onnx: bytes, width: int) -> None:
        self.loads += 1
        self.loaded.add(name)

    async def infer(self, name: str, rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        if self.away:
            raise Retryable("Triton is away")
        if name not in self.loaded:
            raise NotLoaded("not loaded")
        self.calls.append(rows[:, 0].tolist())
        if (rows < 0).any():
            raise ModelError("negative")
        return rows[:, 0].astype(np.float64)


def predict(server: Server, max_batch: int = 8) -> Predict:
    return Predict(
        "realtime",
        Deployments(Store(), server),  # type: ignore[arg-type]
        server,
        SystemClock(),
        max_batch=max_batch,
        calls_in_flight=2,
    )


def batch(values: list[float], model: str = "m") -> Batch:
    count = len(values)
    positions = np.arange(10, 10 + count)
    time = pl.Datetime("us", "UTC")
    frame = pl.DataFrame(
        {
            "tenant_id": ["t"] * count,
            "occurred_at": pl.Series([0] * count, dtype=pl.Int64).cast(time),
            "request_id": [f"r{n}" for n in range(count)],
            "model": [model] * count,
            "version": pl.Series([1] * count, dtype=pl.Int32),
            "vector": [np.array([value], "<f4").tobytes() for value in values],
            "failure": pl.Series([None] * count, dtype=pl.String),
            "expires_at": pl.Series([None] * count, dtype=time),
        }
    )
    raw = RawBatch(TASKS, 0, positions, [None] * count, [b""] * count, positions)
    return Batch(TASKS, 0, frame, np.arange(count), raw)


async def outcomes(processor: Predict, unit: Batch) -> list[tuple[str, str, float | None]]:
    emission = await processor.process([unit], 0, None)
    (sent,) = emission.outgoing
    assert sent.positions.tolist() == unit.positions.tolist()
    assert sent.keys == [name.encode() for name in unit.frame["request_id"]]
    return sent.frame.select("request_id", "outcome", "score").rows()


@settings(deadline=None)
@given(st.lists(st.sampled_from([1.0, 2.0, -1.0]), min_size=1, max_size=40), st.integers(1, 16))
async def test_only_the_rows_that_the_model_refuses_fail(
    values: list[float], max_batch: int
) -> None:
    found = await outcomes(predict(Server(), max_batch), batch(values))
    assert found == [
        (f"r{n}", "failed" if value < 0 else "predicted", None if value < 0 else value)
        for n, value in enumerate(values)
    ]


async def test_a_good_batch_is_one_call_and_a_bad_row_costs_a_halving() -> None:
    server = Server()
    await outcomes(predict(server), batch([1.0] * 8))
    assert [len(call) for call in server.calls] == [8]
    server.calls.clear()
    await outcomes(predict(server), batch([1.0, 1.0, -1.0, *[1.0] * 5]))
    assert [len(call) for call in server.calls] == [8, 4, 2, 2, 1, 1, 4]


async def test_vectors_of_another_width_and_unknown_models_fail_by_name() -> None:
    unit = batch([1.0, 2.0])
    wide = unit.frame.with_columns(pl.Series("vector", [b"\0" * 8, b"\0" * 4]))
    unit = Batch(TASKS, 0, wide, unit.rows, unit.raw)
    emission = await predict(Server()).process([unit], 0, None)
    assert emission.outgoing[0].frame["reason"].to_list() == [
        "bad_vector: the model takes 1 columns",
        None,
    ]
    emission = await predict(Server()).process([batch([1.0], "other")], 0, None)
    assert emission.outgoing[0].frame["reason"].to_list() == ["unknown_model: no version other@1"]


async def test_a_server_that_forgot_is_told_again() -> None:
    server = Server()
    processor = predict(server)
    await outcomes(processor, batch([1.0]))
    await outcomes(processor, batch([1.0]))
    assert server.loads == 1
    server.loaded.clear()
    with pytest.raises(NotLoaded):
        await processor.process([batch([1.0])], 0, None)
    assert await outcomes(processor, batch([1.0])) == [("r0", "predicted", 1.0)]
    assert server.loads == 2


async def test_a_server_that_is_away_decides_nothing() -> None:
    """The runner waits for a Retryable, and only for one: in a group it would be a dead letter."""
    server = Server()
    processor = predict(server, max_batch=2)
    server.away = True
    with pytest.raises(Retryable, match="away"):
        await processor.process([batch([1.0] * 8)], 0, None)
    server.away = False
    assert len(await outcomes(processor, batch([1.0] * 8))) == 8


CONTEXT = b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


async def traced(values: list[float], models: list[str], at: list[int]) -> dict[str, list[Any]]:
    """Run a unit in which the rows `at` are traced: for each call's span, the positions of its
    parent and its links; and its attributes."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    unit = batch(values)
    frame = unit.frame.with_columns(pl.Series("model", models))
    contexts = [CONTEXT if row in at else None for row in range(len(values))]
    unit = Batch(TASKS, 0, frame, unit.rows, replace(unit.raw, traceparents=contexts))
    spans = UnitSpans(provider.get_tracer("test"), "kafka", "g", hold=False)
    with spans.unit([unit]):
        await predict(Server()).process([unit], 0, None)
    ended = exporter.get_finished_spans()
    position = {
        span.context.span_id: (span.attributes or {})["messaging.kafka.offset"]
        for span in ended
        if span.kind is SpanKind.CONSUMER
    }
    found: dict[str, list[Any]] = {}
    for span in ended:
        if span.kind is SpanKind.CLIENT and span.parent is not None:
            mine = [span.parent, *(link.context for link in span.links)]
            attributes = dict(span.attributes or {})
            assert attributes["gen_ai.operation.name"] == "predict"
            assert attributes["gen_ai.provider.name"] == "triton"
            assert span.name == f"predict {attributes['gen_ai.request.model']}"
            of_rows = [position[context.span_id] for context in mine]
            found.setdefault(span.name, []).append((attributes["causemesh.rows"], of_rows))
    return found


async def test_a_models_call_is_linked_to_its_own_records_alone() -> None:
    found = await traced([1.0] * 6, ["m", "n", "m", "n", "m", "other"], [0, 1, 2, 3, 5])
    assert found == {"predict m.v1": [(3, [10, 12])], "predict n.v1": [(2, [11, 13])]}


async def test_a_call_without_a_traced_record_has_no_span() -> None:
    assert await traced([1.0] * 4, ["m", "n", "m", "n"], [1]) == {"predict n.v1": [(2, [11])]}


async def test_halves_of_a_refused_call_are_linked_to_their_halves() -> None:
    found = await traced([1.0, 1.0, -1.0, 1.0], ["m"] * 4, [0, 2, 3])
    assert found == {
        "predict m.v1": [(4, [10, 12, 13]), (2, [10]), (2, [12, 13]), (1, [12]), (1, [13])]
    }
