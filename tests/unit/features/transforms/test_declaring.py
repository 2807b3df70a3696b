"""How a project declares a transform, and what is refused by name."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from causemesh import derived
from causemesh.bus.base import RawBatch
from causemesh.catalogue import SERVICES, TRANSFORMS, Catalogue
from causemesh.cli.running import processes
from causemesh.codec.columns import frame_schema
from causemesh.derived import require_faust
from causemesh.errors import Misdeclared
from causemesh.runner import Batch
from services.features.transforms.feed import Feed
from services.features.transforms.loading import load_function

RECORD = {
    "type": "record",
    "name": "Paid",
    "namespace": "test",
    "fields": [
        {"name": "who", "type": ["null", "string"], "default": None},
        {"name": "amount", "type": "long"},
        {"name": "rate", "type": "double"},
    ],
}
GOOD = {"file": "transforms/t.py", "inputs": ["paid"], "by": "who"}


def project(folder: Path, transform: Any = None, **more: Any) -> Path:
    (folder / "events").mkdir(exist_ok=True)
    (folder / "events" / "Paid.avsc").write_text(json.dumps(RECORD))
    types = {
        "paid": {"record": "Paid", "key": "amount"},
        "total": {"record": "Paid", "key": "who", "transform": transform or GOOD, **more},
    }
    (folder / "catalogue.yaml").write_text(json.dumps({"event_types": types}))
    return folder


def test_a_transform_has_three_topics(tmp_path: Path) -> None:
    catalogue = Catalogue.load([project(tmp_path)], partitions=3)
    one = catalogue.transforms["total"]
    assert "total" not in catalogue.event_types
    assert (one.function, one.scope) == ("total", "tenant")
    feed, state, output = (catalogue.topic(name) for name in (one.feed, one.state, one.output))
    assert (feed.sources, output.sources) == (("events.paid",), (one.feed,))
    assert state.compacted
    assert not feed.lake
    assert output.lake
    assert {feed.partitions, state.partitions, output.partitions} == {3}
    assert output.producers == ("features",)
    assert {"features", "drift", "billing", "agents", "lake"} == set(output.consumers)
    assert "inbox.total" not in catalogue.topics


def test_its_partitions_are_those_of_all_its_topics(tmp_path: Path) -> None:
    catalogue = Catalogue.load([project(tmp_path, partitions=7)])
    one = catalogue.transforms["total"]
    assert {catalogue.topic(name).partitions for name in (one.feed, one.state, one.output)} == {7}
    assert catalogue.topic("events.paid").partitions == 4


@pytest.mark.parametrize(
    ("transform", "more", "problem"),
    [
        ({"file": "t.py", "by": "who"}, {}, "needs file, inputs and by"),
        ({**GOOD, "speed": 1}, {}, "needs file, inputs and by"),
        ({**GOOD, "inputs": ["sold"]}, {}, "declare its input sold above it"),
        ({**GOOD, "inputs": ["total"]}, {}, "declare its input total above it"),
        ({**GOOD, "by": "nobody"}, {}, "needs a field 'nobody'"),
        ({**GOOD, "by": "rate"}, {}, "needs a field 'rate'"),
        ({**GOOD, "scope": "all"}, {}, "scope must be one of"),
        ({**GOOD, "file": "../t.py"}, {}, "outside of the project"),
        (GOOD, {"watermark": "source"}, "of its inputs"),
    ],
)
def test_what_does_not_fit_is_refused(
    transform: Any, more: Any, problem: str, tmp_path: Path
) -> None:
    with pytest.raises(Misdeclared, match=problem):
        Catalogue.load([project(tmp_path, transform, **more)])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (None, "is missing"),
        ("def total(event, table): return []", r"async def total\(event, table\)"),
        ("async def total(event, table): return None", r"async def total\(event, table\)"),
        ("import nothing_of_this_name", "can't be loaded"),
        ("def total(:", "can't be loaded"),
    ],
)
def test_a_file_without_its_function_is_refused(
    text: str | None, problem: str, tmp_path: Path
) -> None:
    one = Catalogue.load([project(tmp_path)]).transforms["total"]
    if text is not None:
        one.file.parent.mkdir()
        one.file.write_text(text)
    with pytest.raises(Misdeclared, match=problem):
        load_function(one)


def test_only_kafka_has_transforms() -> None:
    with pytest.raises(Misdeclared, match="CAUSEMESH_BUS=kafka"):
        require_faust("pulsar")


async def test_the_feed_passes_events_on_byte_for_byte(tmp_path: Path) -> None:
    catalogue = Catalogue.load([project(tmp_path)])
    one = catalogue.transforms["total"]
    record = catalogue.topic("events.paid").record
    rows = [
        {
            "event_id": f"e{n}",
            "tenant_id": "t",
            "occurred_at": n,
            "cause": {"topic": "x", "partition": 0, "position": n, "index": 0, "origin": None},
            "who": who,
            "amount": n,
            "rate": 0.5,
        }
        for n, who in enumerate(["a", None, "b", "a"])
    ]
    names = [field["name"] for field in record["fields"]]
    frame = pl.DataFrame(
        [[row[name] for name in names] for row in rows], schema=frame_schema(record), orient="row"
    )
    positions = np.arange(10, 15)
    values = [b"zero", b"one", b"bad", b"two", b"three"]
    raw = RawBatch("events.paid", 1, positions, [b"k"] * 5, values, positions)
    batch = Batch("events.paid", 1, frame, np.array([0, 1, 3, 4]), raw)
    (fed,) = (await Feed([one]).process([batch], 0, None)).outgoing
    assert (fed.topic, fed.cause_topic, fed.cause_partition) == (one.feed, "events.paid", 1)
    assert list(fed.keys) == [b"a", b"b", b"a"]
    assert fed.positions.tolist() == [10, 13, 14]
    assert fed.frame["value"].to_list() == [b"zero", b"two", b"three"]
    assert fed.frame["event_type"].to_list() == ["paid"] * 3


def test_a_project_with_a_transform_runs_its_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    project(tmp_path)
    assert processes(tmp_path) == (*SERVICES, TRANSFORMS)
    monkeypatch.setenv("CAUSEMESH_BUS", "pulsar")
    with pytest.raises(Misdeclared, match="CAUSEMESH_BUS=kafka"):
        processes(tmp_path)
    monkeypatch.delenv("CAUSEMESH_BUS")
    monkeypatch.delitem(sys.modules, "faust", raising=False)
    monkeypatch.setattr(derived, "find_spec", lambda name: None)
    with pytest.raises(Misdeclared, match=r"pip install 'causemesh\[transforms\]'"):
        processes(tmp_path)
