"""A trace from a vector over what a transform made to the event behind it; a broker in memory."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from causemesh.bus.base import Outbound
from causemesh.bus.memory import MemoryBus
from causemesh.catalogue import Catalogue
from causemesh.cli.context import Connections
from causemesh.cli.tracing import both_ways
from causemesh.codec.decode import Decoder
from causemesh.codec.registry import HttpRegistry, MemoryRegistry
from causemesh.codec.rows import RowEncoder
from causemesh.log import LogReader
from causemesh.settings import ServiceSettings
from causemesh.trace import Tracer

AT = datetime(2026, 1, 1, tzinfo=UTC)
REQUESTS, TASKS, FEED = (
    "inference.requests.v1",
    "inference.tasks.realtime.v1",
    "transforms.session_closed.inputs.v1",
)
CATALOGUE = {
    "event_types": {
        "tapped": {"record": "Tapped", "key": "who"},
        "session_closed": {
            "record": "SessionClosed",
            "key": "who",
            "transform": {"file": "sessions.py", "inputs": ["tapped"], "by": "who"},
        },
    }
}


@pytest.fixture
def catalogue(tmp_path: Path) -> Catalogue:
    (tmp_path / "events").mkdir()
    (tmp_path / "catalogue.yaml").write_text(json.dumps(CATALOGUE))
    for name in ("Tapped", "SessionClosed"):
        fields = [{"name": "who", "type": "string"}]
        record = {"type": "record", "name": name, "namespace": "test", "fields": fields}
        (tmp_path / "events" / f"{name}.avsc").write_text(json.dumps(record))
    return Catalogue.load([tmp_path], partitions=1)


class Apis:
    """A version of one feature, and where features finds the event behind it."""

    services: tuple[str, ...] = ("features", "inference")

    def __init__(self, event: str) -> None:
        newest = [{"topic": event, "partition": 0, "position": 0, "occurred_at_us": 0}]
        behind = {"visits": {"entity": "a", "events": 1, "newest": newest}}
        self._answers: dict[str, Any] = {
            "features": {"features": {"visits.count_1h": 1.0}, "events": behind},
            "inference": [{"version": 1, "features": ["visits.count_1h"]}],
        }

    def client(self, service: str) -> httpx.Client:
        answer = self._answers[service]
        transport = httpx.MockTransport(lambda _: httpx.Response(200, json=answer))
        return httpx.Client(base_url=f"http://{service}", transport=transport)


async def log_of(catalogue: Catalogue) -> Connections:
    """One tap, the session that it closed, and a task whose vector counts it."""
    bus, registry = MemoryBus(), MemoryRegistry()
    for name in catalogue.topics:
        bus.create(name, 1)

    async def send(topic: str, cause: str, event_id: str, **fields: Any) -> None:
        declared = catalogue.topic(topic)
        schema_id = await registry.register(declared.subject, declared.record)
        row = {"event_id": event_id, "tenant_id": "t", "occurred_at": AT, **fields}
        if cause:
            row["cause"] = {"topic": cause, "partition": 0, "position": 0, "index": 0}
        value = RowEncoder(declared.record, schema_id).encode(row)
        await bus.producer("t").send([Outbound(topic, 0, [b"a"], [value])])

    await send("inbox.tapped", "", "tap", who="a")
    await send("events.tapped", "inbox.tapped", "tap", who="a")
    await send(FEED, "events.tapped", "fed", event_type="tapped", value=b"bytes of the tap")
    await send("events.session_closed", FEED, "session", who="a")
    asked = {"model": "m", "entities": [{"name": "who", "value": "a"}], "inputs": []}
    await send(REQUESTS, "inbox.requests", "ask", **asked)
    vector = np.array([1.0], "<f4").tobytes()
    told = {"request_id": "ask", "model": "m", "version": 1, "vector": vector}
    await send(TASKS, REQUESTS, "task", **told, features_as_of=AT)
    decoder = Decoder(registry)
    return Connections(
        ServiceSettings(),
        catalogue,
        bus,
        HttpRegistry("http://unused"),
        decoder,
        LogReader(bus, catalogue, decoder),
        Tracer(bus, catalogue, decoder),
    )


async def behind_the_view(catalogue: Catalogue, event: str) -> dict[str, Any]:
    """The only event under the task's view, as the tree has it."""
    open_to = await log_of(catalogue)
    node = await open_to.tracer.at(TASKS, 0, 0)
    assert node is not None
    told = (await both_ways(open_to, Apis(event), node)).document()
    (vector,) = [step for step in told["below"] if step["title"] == "vector"]
    assert vector["equal_to_recomputed"]
    ((found,),) = [view["below"] for view in vector["below"]]
    await open_to.registry.close()
    return dict(found)


async def test_behind_what_a_transform_made_is_the_event_from_outside(catalogue: Catalogue) -> None:
    step = await behind_the_view(catalogue, "events.session_closed")
    for topic in ("events.session_closed", FEED, "events.tapped", "inbox.tapped"):
        assert step["title"].removeprefix("because of ") == f"{topic}[0]@0"
        assert "value" not in step  # the bytes of the tap, which is the next step
        step = next(iter(step["below"]), {})
    assert step == {}


async def test_an_event_from_outside_is_told_by_its_place(catalogue: Catalogue) -> None:
    step = await behind_the_view(catalogue, "events.tapped")
    assert step == {"title": "events.tapped[0]@0", "below": []}
