"""Every catalogue entry: its records round-trip, may evolve, and have owners that exist."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from causemesh.catalogue import DEADLETTERS, LAKE, SERVICES, WATERMARK, Catalogue, Topic
from causemesh.codec.columns import frame_schema
from causemesh.codec.decode import Decoder
from causemesh.codec.encode import FEW_ROWS, Encoder
from causemesh.codec.registry import MemoryRegistry

ROOT = Path(__file__).parents[2]
CATALOGUE = Catalogue.load([ROOT / "tests" / "project"])
FLIGHTS = Catalogue.load([ROOT / "examples" / "flights"])
RECORDS = {
    **{name: topic.record for name, topic in [*CATALOGUE.topics.items(), *FLIGHTS.topics.items()]},
    **CATALOGUE.controls,
}
PEOPLE, OUTSIDE = "people", "external"
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
PRIMITIVES: Mapping[str, st.SearchStrategy[Any]] = {
    "boolean": st.booleans(),
    "int": st.integers(-(1 << 31), (1 << 31) - 1),
    "long": st.integers(-(1 << 63), (1 << 63) - 1),
    "float": st.floats(width=32, allow_nan=False),
    "double": st.floats(allow_nan=False),
    "string": st.text(st.characters(codec="utf-8"), max_size=20),
    "bytes": st.binary(max_size=40),
}
INSTANTS = st.integers(-(10**15), 10**16).map(lambda us: EPOCH + timedelta(microseconds=us))


def values(avro: Any) -> st.SearchStrategy[Any]:
    """Values of an Avro type of the catalogue."""
    if isinstance(avro, list):
        return st.none() | values(next(branch for branch in avro if branch != "null"))
    if isinstance(avro, str):
        return PRIMITIVES[avro]
    if avro.get("logicalType") == "timestamp-micros":
        return INSTANTS
    return nested(avro)


def nested(avro: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values of a type that holds others."""
    if avro["type"] == "record":
        return st.fixed_dictionaries({one["name"]: values(one["type"]) for one in avro["fields"]})
    if avro["type"] == "array":
        return st.lists(values(avro["items"]), max_size=3)
    if avro["type"] == "enum":
        return st.sampled_from(avro["symbols"])
    return values(avro["type"])


async def written(schema: dict[str, Any], rows: list[dict[str, Any]]) -> tuple[Any, list[bytes]]:
    registry = MemoryRegistry()
    frame = pl.DataFrame(rows, schema=frame_schema(schema), orient="row")
    return registry, Encoder(schema, await registry.register("s", schema)).encode(frame)


@pytest.mark.parametrize("name", sorted(RECORDS))
@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
async def test_records_round_trip(name: str, data: st.DataObject) -> None:
    schema = RECORDS[name]
    some = data.draw(st.lists(values(schema), min_size=1, max_size=4))
    for rows in (some, some * FEW_ROWS):  # by rows, and by columns
        registry, encoded = await written(schema, rows)
        decoded = await Decoder(registry).decode(encoded, schema)
        assert decoded.bad == {}
        assert decoded.frame.to_dicts() == rows


OPTIONAL = {"name": "added_later", "type": ["null", "string"], "default": None}
DEFAULTED = {"name": "counted_later", "type": "long", "default": 7}


@pytest.mark.parametrize("name", sorted(RECORDS))
@pytest.mark.parametrize("count", [3, 40])
@settings(max_examples=2, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
async def test_a_field_with_a_default_may_come_and_go(
    name: str, count: int, data: st.DataObject
) -> None:
    old = RECORDS[name]
    new = {**old, "fields": [*old["fields"], OPTIONAL, DEFAULTED]}
    row = data.draw(values(old))
    later = {**row, "added_later": "x", "counted_later": 9}
    registry, encoded = await written(old, [row] * count)
    forward = await Decoder(registry).decode(encoded, new)
    assert forward.bad == {}
    assert forward.frame.to_dicts() == [{**row, "added_later": None, "counted_later": 7}] * count
    registry, encoded = await written(new, [later] * count)
    back = await Decoder(registry).decode(encoded, old)
    assert back.bad == {}
    assert back.frame.to_dicts() == [row] * count


@settings(max_examples=2, deadline=None)
@given(data=st.data())
async def test_a_required_field_may_not_come_later(data: st.DataObject) -> None:
    old = RECORDS["inference.predictions.v1"]
    new = {**old, "fields": [*old["fields"], {"name": "needed", "type": "long"}]}
    registry, encoded = await written(old, [data.draw(values(old))] * 40)
    assert len((await Decoder(registry).decode(encoded, new)).bad) == 40


TOPICS = {**CATALOGUE.topics, **FLIGHTS.topics}


@pytest.fixture(params=sorted(TOPICS))
def topic(request: pytest.FixtureRequest) -> Topic:
    return TOPICS[request.param]


def test_everyone_named_exists(topic: Topic) -> None:
    assert topic.owner in SERVICES or (topic.owner, topic.name) == ("mesh", DEADLETTERS)
    assert topic.producers
    assert set(topic.producers) <= {*SERVICES, LAKE, OUTSIDE}
    assert topic.consumers
    assert set(topic.consumers) <= {*SERVICES, LAKE, PEOPLE}
    assert (LAKE in topic.consumers) == topic.lake


def test_the_owner_writes_its_topic(topic: Topic) -> None:
    if topic.name == "inference.requests.v1":  # inference's form, written by the door alone
        assert (topic.owner, topic.producers) == ("inference", ("ingest",))
    elif topic.name == "features.skew.v1":  # features' code, run beside the lake's writer
        assert (topic.owner, topic.producers) == ("features", (LAKE,))
    elif topic.name == DEADLETTERS:
        assert set(topic.producers) == {*SERVICES, LAKE}
    else:
        assert topic.owner in topic.producers


def test_only_inboxes_are_written_from_outside(topic: Topic) -> None:
    assert (OUTSIDE in topic.producers) == (topic.form == "inbox")


def test_schemas_stay_compatible_both_ways(topic: Topic) -> None:
    assert topic.compatibility == "FULL_TRANSITIVE"


def test_the_key_is_made_of_fields(topic: Topic) -> None:
    fields = {one["name"] for one in topic.record["fields"]}
    # An entity's value lies inside `entities`; a dead letter keeps the key of its cause.
    assert set(topic.key.split(", ")) <= fields | {"entity"}


def test_state_topics_carry_a_sequence(topic: Topic) -> None:
    fields = {one["name"]: one["type"] for one in topic.record["fields"]}
    if topic.form == "state":
        assert fields["sequence"] == "long"


def test_watermarks_come_from_co_partitioned_topics(topic: Topic) -> None:
    for source in topic.sources:
        assert TOPICS[source].partitions == topic.partitions


def test_controls_are_the_watermark_alone() -> None:
    assert set(CATALOGUE.controls) == {WATERMARK}
