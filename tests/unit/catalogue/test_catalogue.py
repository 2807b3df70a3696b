"""The catalogue refuses what would hurt later, and says what to change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from causemesh.catalogue import Catalogue
from causemesh.errors import Misdeclared
from causemesh.schemas import check_record


def record(*types: Any) -> dict[str, Any]:
    fields = [{"name": f"f{n}", "type": kind} for n, kind in enumerate(types)]
    return {"type": "record", "name": "R", "fields": fields}


def project(folder: Path, **entry: Any) -> Path:
    (folder / "events").mkdir()
    schema = {
        "type": "record",
        "name": "Sold",
        "namespace": "shop",
        "fields": [{"name": "sku", "type": "string"}],
    }
    (folder / "events" / "Sold.avsc").write_text(json.dumps(schema))
    (folder / "catalogue.yaml").write_text(json.dumps({"event_types": {"sold": entry}}))
    return folder


def test_the_shipped_catalogue_is_sound() -> None:
    catalogue = Catalogue.load()
    assert catalogue.topic("inference.predictions.v1").record_name == "causemesh.PredictionMade"
    for topic in catalogue.topics.values():
        names = [field["name"] for field in topic.record["fields"]]
        assert names[:3] == ["event_id", "tenant_id", "occurred_at"]
        assert ("cause" in names) == (topic.form != "inbox")


def test_an_event_type_becomes_two_topics(tmp_path: Path) -> None:
    catalogue = Catalogue.load([project(tmp_path, record="Sold", key="sku")], partitions=3)
    assert catalogue.topic("inbox.sold").form == "inbox"
    assert catalogue.topic("events.sold").partitions == 3
    assert catalogue.source_partitions("events.sold") == [("inbox.sold", n) for n in range(3)]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"record": "Sold", "key": "price"}, "not a field"),
        ({"record": "Gone", "key": "sku"}, "missing"),
        ({"record": "Sold", "key": "sku", "parts": 1}, "unknown settings"),
    ],
)
def test_a_wrong_event_type_is_refused(tmp_path: Path, entry: dict[str, Any], message: str) -> None:
    with pytest.raises(Misdeclared, match=message):
        Catalogue.load([project(tmp_path, **entry)])


def test_an_undeclared_topic_is_refused_at_start() -> None:
    catalogue = Catalogue.load()
    catalogue.require("billing", reads=["inference.predictions.v1"], writes=["billing.invoices.v1"])
    with pytest.raises(Misdeclared, match="not in the catalogue"):
        catalogue.require("billing", reads=["inference.prediction.v1"])
    with pytest.raises(Misdeclared, match="not among its producers"):
        catalogue.require("billing", writes=["inference.predictions.v1"])


RECURSIVE = {"type": "record", "name": "N", "fields": [{"name": "next", "type": ["null", "N"]}]}
EMPTY = {"type": "record", "name": "E", "fields": [{"name": "n", "type": "null"}]}


@pytest.mark.parametrize(
    "kind",
    [
        RECURSIVE,
        {"type": "array", "items": "null"},
        {"type": "array", "items": EMPTY},
        {"type": "array", "items": {"type": "fixed", "name": "Z", "size": 0}},
    ],
)
def test_dangerous_schemas_are_refused_everywhere(kind: Any) -> None:
    with pytest.raises(Misdeclared):
        check_record(record(kind), columnar=False)


@pytest.mark.parametrize(
    "kind", [{"type": "map", "values": "long"}, ["string", "long"], ["null", "string", "long"]]
)
def test_mesh_topics_stay_columnar(kind: Any) -> None:
    check_record(record(kind), columnar=False)
    with pytest.raises(Misdeclared):
        check_record(record(kind), columnar=True)
