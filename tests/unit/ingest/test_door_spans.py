"""The door's calls write their trace context beside the record."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from opentelemetry.sdk.trace import TracerProvider

from causemesh.bus.memory import MemoryBus
from causemesh.catalogue import Catalogue
from causemesh.client import REQUESTS, Client
from causemesh.codec.registry import MemoryRegistry
from causemesh.spans_sending import DoorSpans
from services.ingest.api import routes
from services.ingest.settings import IngestSettings

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
ASK = {
    "request_id": "r1",
    "tenant_id": "t",
    "model": "m",
    "entities": {"flight": "f1"},
    "inputs": {"x": 1.0},
}


@pytest.mark.parametrize("exported", [True, False])
@pytest.mark.parametrize("header", [f"00-{TRACE}-00f067aa0ba902b7-01", None])
async def test_a_prediction_carries_the_callers_trace(
    header: str | None, *, exported: bool
) -> None:
    catalogue, bus = Catalogue.load(), MemoryBus()
    for topic in catalogue.topics.values():
        bus.create(topic.name, topic.partitions)
    client = Client(catalogue, MemoryRegistry(), bus.producer("p"))
    tracer = TracerProvider(shutdown_on_exit=False).get_tracer("test") if exported else None
    nothing: Any = None
    app = FastAPI()
    spans = DoorSpans(tracer, "memory")
    app.include_router(
        routes(client, nothing, nothing, bus.producer("p"), IngestSettings(), spans=spans)
    )
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://door"
    ) as http:
        headers = {"traceparent": header} if header else {}
        answer = await http.post("/predictions?wait_ms=0", json=ASK, headers=headers)
    assert answer.status_code == 202, answer.text
    written = [
        one for (topic, _), log in bus.logs.items() if topic == REQUESTS for one in log.traceparents
    ]
    assert len(written) == 1
    if header is None and not exported:
        assert written == [None]
    else:
        assert written[0] is not None
        assert (TRACE.encode() in written[0]) is (header is not None)
