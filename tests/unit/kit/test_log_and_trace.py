"""Reading the log back and walking its causes, over a broker in memory."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import polars as pl
import pytest

from causemesh.bus.base import Outbound
from causemesh.bus.memory import MemoryBus
from causemesh.catalogue import Catalogue
from causemesh.codec.columns import frame_schema
from causemesh.codec.decode import Decoder
from causemesh.codec.encode import RegistryEncoders
from causemesh.codec.registry import MemoryRegistry
from causemesh.log import LogReader, Span
from causemesh.runner import Emitter, Outgoing
from causemesh.trace import Node, Tracer

INBOX = "inbox.requests"
REQUESTS = "inference.requests.v1"
TASKS = "inference.tasks.realtime.v1"
PREDICTIONS = "inference.predictions.v1"
REVIEWS = "agents.reviews.v1"
RUNS = "agents.runs.v1"
CATALOGUE = Catalogue.load(partitions=2)
ORIGIN = pl.Struct({"topic": pl.String, "partition": pl.Int32, "position": pl.Int64})


def blank(avro: Any) -> Any:
    """The plainest value of a type."""
    if isinstance(avro, list):
        return None
    kind = avro if isinstance(avro, str) else avro["type"]
    if kind == "record":
        return {field["name"]: blank(field["type"]) for field in avro["fields"]}
    if kind == "enum":
        return avro["symbols"][0]
    plain: dict[str, Any] = {"array": [], "string": "", "bytes": b"", "boolean": False}
    return plain.get(kind, 0)


def frame(topic: str, count: int, **columns: list[Any]) -> pl.DataFrame:
    record = CATALOGUE.topic(topic).record
    schema = {name: kind for name, kind in frame_schema(record).items() if name != "cause"}
    if "event_id" not in columns:
        del schema["event_id"]
    given = dict(columns)
    for field in record["fields"]:
        given.setdefault(field["name"], [blank(field["type"])] * count)
    return pl.DataFrame({name: pl.Series(given[name], dtype=kind) for name, kind in schema.items()})


class Mesh:
    """A mesh's topics with what a request leaves in them."""

    def __init__(self) -> None:
        self.bus = MemoryBus()
        for name in CATALOGUE.topics:
            self.bus.create(name, 2)
        registry = MemoryRegistry()
        self.decoder = Decoder(registry)
        self.encoders = RegistryEncoders(registry)
        writes = [REQUESTS, TASKS, PREDICTIONS, REVIEWS, RUNS]
        self.emitter = Emitter(CATALOGUE, self.encoders, self.bus.producer("t"), writes)
        self.log = LogReader(self.bus, CATALOGUE, self.decoder)
        self.tracer = Tracer(self.bus, CATALOGUE, self.decoder)

    async def ask(self, *ids: str, partition: int = 0) -> None:
        """Requests as they come from outside."""
        topic = CATALOGUE.topic(INBOX)
        encoder = await self.encoders.encoder(topic.subject, topic.record)
        values = encoder.encode(frame(INBOX, len(ids), event_id=list(ids)))
        keys: list[bytes | None] = [None] * len(ids)
        await self.bus.producer("out").send([Outbound(INBOX, partition, keys, values)])

    async def send(
        self,
        topic: str,
        cause: tuple[str, int, list[int]],
        *,
        origins: list[tuple[str, int, int]] | None = None,
        **columns: list[Any],
    ) -> None:
        """Records caused by positions of one partition; they stay on its number."""
        source, partition, positions = cause
        keys: list[bytes | None] = [None] * len(positions)
        names = ("topic", "partition", "position")
        named = [dict(zip(names, one, strict=True)) for one in origins or []]
        behind = pl.Series(named, dtype=ORIGIN) if named else None
        part = Outgoing(
            topic,
            frame(topic, len(positions), **columns),
            keys,
            source,
            partition,
            np.array(positions),
            origins=behind,
        )
        await self.emitter.send([part], {})

    async def watermark(self, topic: str, source: str, partition: int, at_us: int) -> None:
        await self.emitter.send([], {(topic, source, partition): at_us})

    async def ids(self, spans: dict[tuple[str, int], Span]) -> list[str]:
        async with asyncio.timeout(5):
            return [
                one
                async for batch in self.log.read(spans)
                for one in batch.frame["event_id"].to_list()
            ]


@pytest.fixture
async def mesh() -> Mesh:
    """Two requests all the way to predictions, one of which opens a review by the outbox."""
    made = Mesh()
    await made.ask("r-0", "r-1")
    await made.send(REQUESTS, (INBOX, 0, [0, 1]), event_id=["r-0", "r-1"])
    await made.watermark(REQUESTS, INBOX, 0, 50)
    await made.send(TASKS, (REQUESTS, 0, [0, 1]), request_id=["r-0", "r-1"])
    await made.send(PREDICTIONS, (TASKS, 0, [0, 1]), request_id=["r-0", "r-1"])
    behind = [(PREDICTIONS, 0, 1)]
    await made.send(
        REVIEWS, ("outbox.agents", 0, [7]), origins=behind, request_id=["r-1"], review_id=["v"]
    )
    return made


async def test_a_span_is_after_one_position_up_to_another(mesh: Mesh) -> None:
    assert await mesh.ids({(INBOX, 0): Span(-1, 1)}) == ["r-0", "r-1"]
    assert await mesh.ids({(INBOX, 0): Span(0, 1)}) == ["r-1"]
    assert await mesh.ids({(INBOX, 0): Span(-1, 0)}) == ["r-0"]
    assert await mesh.ids({(INBOX, 0): Span(1, 1), (INBOX, 1): Span(-1, -1)}) == []


async def test_the_ends_include_watermarks_and_reading_passes_them(mesh: Mesh) -> None:
    spans = await mesh.log.ends([REQUESTS])
    assert spans == {(REQUESTS, 0): Span(-1, 2), (REQUESTS, 1): Span(-1, 0)}
    assert await mesh.ids(spans) == ["r-0", "r-1"]


async def test_records_that_came_after_the_span_are_not_read(mesh: Mesh) -> None:
    spans = await mesh.log.ends([INBOX])
    await mesh.ask("r-2")
    assert await mesh.ids(spans) == ["r-0", "r-1"]
    assert await mesh.ids(await mesh.log.ends([INBOX])) == ["r-0", "r-1", "r-2"]


async def test_what_was_sent_again_is_read_once_on_fact_topics_only(mesh: Mesh) -> None:
    before = await mesh.ids(await mesh.log.ends([PREDICTIONS]))
    await mesh.send(PREDICTIONS, (TASKS, 0, [0, 1]), request_id=["r-0", "r-1"])
    spans = await mesh.log.ends([PREDICTIONS])
    assert spans[(PREDICTIONS, 0)].last == 3
    assert await mesh.ids(spans) == before
    await mesh.ask("r-0")
    assert await mesh.ids(await mesh.log.ends([INBOX])) == ["r-0", "r-1", "r-0"]


async def test_one_record_by_its_position(mesh: Mesh) -> None:
    found = await mesh.log.one(INBOX, 0, 1)
    assert found is not None
    assert found.frame["event_id"].to_list() == ["r-1"]
    assert found.positions.tolist() == [1]
    assert await mesh.log.one(REQUESTS, 0, 2) is None  # a watermark


async def test_a_record_that_does_not_decode_is_none(mesh: Mesh) -> None:
    await mesh.bus.producer("out").send([Outbound(INBOX, 1, [None], [b"{}"])])
    assert await mesh.log.one(INBOX, 1, 0) is None
    assert await mesh.ids(await mesh.log.ends([INBOX])) == ["r-0", "r-1"]


@pytest.mark.parametrize("position", [2, 99, -1, -2])
async def test_a_position_that_holds_nothing_is_none(mesh: Mesh, position: int) -> None:
    async with asyncio.timeout(2):
        assert await mesh.log.one(INBOX, 0, position) is None
        assert await mesh.log.one(INBOX, 9, position) is None


def places(nodes: list[Node]) -> list[str]:
    return [node.place for node in nodes]


async def found(mesh: Mesh, place: tuple[str, int, int]) -> Node:
    node = await mesh.tracer.at(*place)
    assert node is not None
    return node


async def test_causes_go_back_to_what_came_from_outside(mesh: Mesh) -> None:
    chain = await mesh.tracer.causes(await found(mesh, (PREDICTIONS, 0, 1)))
    assert places(chain) == [f"{TASKS}[0]@1", f"{REQUESTS}[0]@1", f"{INBOX}[0]@1"]
    assert chain[-1].cause is None


async def test_an_outbox_record_goes_on_from_its_origin(mesh: Mesh) -> None:
    review = await found(mesh, (REVIEWS, 0, 0))
    assert review.record["cause"]["topic"] == "outbox.agents"
    assert review.cause == (PREDICTIONS, 0, 1)
    chain = await mesh.tracer.causes(review)
    assert places(chain)[0] == f"{PREDICTIONS}[0]@1"
    assert places(chain)[-1] == f"{INBOX}[0]@1"


async def test_an_outbox_record_of_the_api_has_no_cause_in_the_log(mesh: Mesh) -> None:
    await mesh.send(REVIEWS, ("outbox.agents", 0, [8]), request_id=["r-1"])
    node = await found(mesh, (REVIEWS, 0, 1))
    assert node.cause is None
    assert await mesh.tracer.causes(node) == []


@pytest.mark.parametrize(
    ("cause", "effects"),
    [
        ((INBOX, 0, 1), [f"{REQUESTS}[0]@1"]),
        ((REQUESTS, 0, 0), [f"{TASKS}[0]@0"]),
        ((PREDICTIONS, 0, 1), [f"{REVIEWS}[0]@0"]),
        ((PREDICTIONS, 0, 0), []),
        ((REVIEWS, 0, 0), []),
    ],
)
async def test_effects_are_what_names_a_record(
    mesh: Mesh, cause: tuple[str, int, int], effects: list[str]
) -> None:
    assert places(await mesh.tracer.effects(await found(mesh, cause))) == effects


async def test_effects_sent_again_are_named_once(mesh: Mesh) -> None:
    await mesh.send(PREDICTIONS, (TASKS, 0, [0, 1]), request_id=["r-0", "r-1"])
    effects = await mesh.tracer.effects(await found(mesh, (TASKS, 0, 0)))
    assert places(effects) == [f"{PREDICTIONS}[0]@0"]


async def test_an_id_is_found_where_a_record_carries_it(mesh: Mesh) -> None:
    assert sorted(places(await mesh.tracer.find("r-1"))) == [
        f"{REVIEWS}[0]@0",
        f"{INBOX}[0]@1",
        f"{PREDICTIONS}[0]@1",
        f"{REQUESTS}[0]@1",
        f"{TASKS}[0]@1",
    ]
    assert places(await mesh.tracer.find("r-1", [TASKS])) == [f"{TASKS}[0]@1"]
    derived = (await found(mesh, (TASKS, 0, 0))).record["event_id"]
    assert places(await mesh.tracer.find(derived)) == [f"{TASKS}[0]@0"]


async def test_text_that_is_no_id_is_not_found(mesh: Mesh) -> None:
    assert await mesh.tracer.find("outbox.agents") == []
    assert await mesh.tracer.find("r-") == []
