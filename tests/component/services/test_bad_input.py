"""Bad input in the middle of good input: the bad one is refused by name, the good ones go on.

docs/bad-input.md is the table of these tests. Everything is sent once, at the start of the module:
each bad record between good ones of one batch, and each bad call to the REST API.
"""

from __future__ import annotations

import asyncio
import json
import re
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import polars as pl
import pytest
import pytest_asyncio

from causemesh.codec.wire import header
from causemesh.local import Endpoints
from causemesh.local.mesh import Mesh
from services.ingest.domain import MAX_VALUE_BYTES, REASONS
from tests.component.services.conftest import (
    PREDICTIONS,
    READINGS,
    REJECTS,
    ROOT,
    Outside,
    opened,
    reading,
    request,
    until,
)

pytestmark = pytest.mark.servers
GOOD_CALLS = 5
SIDE = 20  # good records on either side of the bad one
NOW = datetime.now(UTC)
BIG = "x" * MAX_VALUE_BYTES
NAN = float("nan")

# What the door refuses on inbox.reading: a change of a good row, by reason code.
ROWS: dict[str, dict[str, Any]] = {
    "missing_tenant": {"tenant_id": " "},
    "missing_id": {"event_id": ""},
    "duplicate": {"event_id": "good-0"},
    "too_old": {"occurred_at": NOW - timedelta(days=40)},
    "from_future": {"occurred_at": NOW + timedelta(hours=1)},
    "oversize": {"site": BIG},
    "not_a_number": {"value": NAN},
}
BYTES = ("undecodable", "not_framed", "unknown_schema", "wrong_record")
# What becomes of requests: outcome and a change of a good row, by reason code.
OUTCOMES: dict[str, tuple[str, dict[str, Any]]] = {
    "unknown_model": ("failed", {"model": "nobody-registered-this"}),
    "missing_feature": ("failed", {"inputs": []}),
    "expired": ("expired", {"expires_at": NOW}),
    "model_error": ("failed", {"inputs": [{"name": "row", "value": 9.0}]}),
}
# Refused calls: status, problem type, and a change of a good event or of a good question.
EVENT_CALLS: dict[str, tuple[int, str, Any]] = {
    "truncated bytes": (422, "invalid", b'{"specversion": "1.0", "id"'),
    "foreign bytes": (422, "invalid", b"\x00\xff\xfenot JSON"),
    "wrong type": (422, "invalid", {"data": {"sensor": "s", "value": "warm"}}),
    "another record": (422, "invalid", {"type": "outage"}),
    "missing tenant": (422, "invalid", {"tenantid": " "}),
    "oversize": (413, "oversize", {"data": {"sensor": "s", "site": BIG}}),
    "not a number": (422, "not_a_number", {"data": {"sensor": "s", "value": NAN}}),
}
ASK_CALLS: dict[str, tuple[int, str, dict[str, Any]]] = {
    "missing tenant": (422, "invalid", {"tenant_id": " "}),
    "duplicate": (409, "duplicate", {"request_id": "good-0"}),
    "too old": (422, "too_old", {"occurred_at": (NOW - timedelta(days=40)).isoformat()}),
    "from the future": (422, "from_future", {"occurred_at": (NOW + timedelta(1)).isoformat()}),
    "oversize": (413, "oversize", {"entities": {"sensor": BIG}}),
    "unknown model": (422, "unknown_model", {"model": "nobody-registered-this"}),
    "missing feature": (422, "missing_feature", {"inputs": {}}),
    "not a number": (422, "not_a_number", {"inputs": {"row": NAN}}),
    "expired": (504, "expired", {"expires_at": NOW.isoformat()}),
    "model error": (422, "model_error", {"inputs": {"row": 9.0}}),
}
pages = pytest.mark.parametrize


@dataclass
class Sent:
    """What was sent and what came of it; the bad value of each case is in the middle."""

    run: str
    outside: Outside
    model: str = ""
    readings: dict[str, bytes] = field(default_factory=dict)
    requests: dict[str, bytes] = field(default_factory=dict)
    answers: dict[str, httpx.Response] = field(default_factory=dict)
    large: bytes | None = None
    events: pl.DataFrame = field(default_factory=pl.DataFrame)
    rejects: pl.DataFrame = field(default_factory=pl.DataFrame)
    outcomes: pl.DataFrame = field(default_factory=pl.DataFrame)

    def tenant(self, case: str) -> str:
        """Every case has a tenant of its own."""
        return f"{self.run}-{case}"

    def rejected(self, value: bytes) -> list[dict[str, Any]]:
        return self.rejects.filter(pl.col("original_value") == value).to_dicts()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def sent(mesh: Mesh, cluster: Endpoints, lookup: str) -> AsyncIterator[Sent]:
    async with opened(mesh, cluster) as outside:
        made = Sent(f"t{uuid.uuid4().hex[:8]}", outside)
        made.model = lookup
        for number, case in enumerate([*ROWS, *BYTES]):
            await send_readings(made, case, number % 4)
        for number, case in enumerate([*OUTCOMES, "not_a_number"]):
            await send_requests(made, case, number % 4)
        await until(lambda: arrived(made, 0), 60)
        await call_all(made)
        await until(lambda: arrived(made, GOOD_CALLS), 60)
        made.large = await bytes_at_cause(made, "oversize")
        yield made


async def send_readings(made: Sent, case: str, partition: int) -> None:
    tenant = made.tenant(case)
    good = [reading(tenant, f"good-{n}") for n in range(2 * SIDE)]
    values = await made.outside.values("inbox.reading", good)
    (sound,) = await made.outside.values("inbox.reading", [reading(tenant, "bad")])
    if case in ROWS:
        row = {**reading(tenant, "bad"), **ROWS[case]}
        (bad,) = await made.outside.values("inbox.reading", [row])
    elif case == "wrong_record":
        other = {**reading(tenant, "bad"), "reading_id": "r", "failed": True}
        for name in ("sensor", "site", "value"):
            del other[name]
        (bad,) = await made.outside.values("inbox.outage", [other])
    else:
        # the tenant makes the bytes this test's own
        foreign = f'{{"tenant_id": "{tenant}"}}'.encode()
        unknown = header(987_654_321) + sound[5:]
        bad = {"undecodable": sound[:-3], "not_framed": foreign, "unknown_schema": unknown}[case]
    made.readings[case] = bad
    await made.outside.write("inbox.reading", [*values[:SIDE], bad, *values[SIDE:]], partition)


async def send_requests(made: Sent, case: str, partition: int) -> None:
    tenant = made.tenant(f"ask-{case}")
    change = OUTCOMES[case][1] if case in OUTCOMES else {"inputs": [{"name": "row", "value": NAN}]}
    rows = [request(tenant, f"good-{n}", made.model) for n in range(2 * SIDE)]
    rows.insert(SIDE, {**request(tenant, "bad", made.model), **change})
    values = await made.outside.values("inbox.requests", rows)
    made.requests[case] = values[SIDE]
    await made.outside.write("inbox.requests", values, partition)


async def arrived(made: Sent, posted: int) -> bool:
    """Whether everything came out somewhere; keeps what did."""
    mine = pl.col("tenant_id").str.starts_with(made.run)
    made.events = (await made.outside.written(READINGS)).filter(mine)
    made.outcomes = (await made.outside.written(PREDICTIONS)).filter(mine)
    made.rejects = await made.outside.written(REJECTS)
    ended = made.outcomes.height + len(made.rejected(made.requests["not_a_number"]))
    events = 2 * SIDE * len(made.readings) + posted
    return made.events.height >= events and ended >= (2 * SIDE + 1) * len(made.requests)


async def bytes_at_cause(made: Sent, reason: str) -> bytes | None:
    """The record that the one reject with this reason names as its cause."""
    (cause,) = made.rejects.filter(pl.col("reason") == reason)["cause"].to_list()
    source = (cause["topic"], cause["partition"])
    reader = made.outside.bus.reader({source: cause["position"] - 1})
    try:
        while True:
            for raw in await reader.fetch(1, 1.0):
                return raw.values[0]
    finally:
        await reader.close()


def as_json(document: dict[str, Any]) -> bytes:
    """With NaN in it, which httpx would refuse to write."""
    return json.dumps(document).encode()


async def call_all(made: Sent) -> None:
    """All REST calls at once, among calls that are good."""
    tenant = made.tenant("rest")
    good = {"specversion": "1.0", "id": "bad", "source": "test", "type": "reading"}
    good |= {"tenantid": tenant, "data": {"sensor": "s"}}
    ask = {"tenant_id": tenant, "model": made.model, "version": 1}
    ask |= {"inputs": {"row": 1.0}}
    calls = {}
    for name, (_, _, change) in EVENT_CALLS.items():
        body = change if isinstance(change, bytes) else as_json(good | change)
        calls[f"event: {name}"] = ("/events", body)
    taken = {"tenant_id": made.tenant("ask-expired")}  # there a good-0 was accepted
    for name, (_, _, change) in ASK_CALLS.items():
        asked = change | taken if name == "duplicate" else change
        calls[f"ask: {name}"] = ("/predictions?wait_ms=20000", as_json(ask | asked))
    for number in range(GOOD_CALLS):
        calls[f"good ask {number}"] = ("/predictions?wait_ms=20000", as_json(ask))
        calls[f"good event {number}"] = ("/events", as_json(good | {"id": f"good-{number}"}))
    headers = {"Content-Type": "application/json"}
    asked_all = [
        made.outside.ask("ingest", "POST", path, content=body, headers=headers)
        for path, body in calls.values()
    ]
    made.answers = dict(zip(calls, await asyncio.gather(*asked_all), strict=True))


@pages("case", [*ROWS, *BYTES])
def test_on_the_topic(sent: Sent, case: str) -> None:
    value = sent.readings[case]
    if case == "oversize":  # too large to be kept beside the reason: its cause is where it lies
        (found,) = sent.rejects.filter(pl.col("reason") == case).to_dicts()
        assert found["original_value"] is None
        assert sent.large == value
    else:
        (found,) = sent.rejected(value)
    assert found["reason"] == case
    events = sent.events.filter(pl.col("tenant_id") == sent.tenant(case))
    assert sorted(events["event_id"]) == sorted(f"good-{n}" for n in range(2 * SIDE))


@pages("case", [*OUTCOMES, "not_a_number"])
def test_requests(sent: Sent, case: str) -> None:
    outcomes = sent.outcomes.filter(pl.col("tenant_id") == sent.tenant(f"ask-{case}"))
    good = outcomes.filter(pl.col("request_id") != "bad")
    assert sorted(good["request_id"]) == sorted(f"good-{n}" for n in range(2 * SIDE))
    assert set(good["outcome"]) == {"predicted"}
    assert set(good["score"]) == {0.25}
    bad = outcomes.filter(pl.col("request_id") == "bad").to_dicts()
    if case == "not_a_number":
        (found,) = sent.rejected(sent.requests[case])
        assert (found["reason"], found["claimed_id"], bad) == (case, "bad", [])
    else:
        (one,) = bad
        assert (one["outcome"], one["score"]) == (OUTCOMES[case][0], None)
        assert one["reason"].partition(":")[0] == case
        assert sent.rejected(sent.requests[case]) == []


@pages("call", EVENT_CALLS)
def test_posted_events(sent: Sent, call: str) -> None:
    status, kind, _ = EVENT_CALLS[call]
    check_problem(sent.answers[f"event: {call}"], status, kind)
    good = [sent.answers[f"good event {n}"] for n in range(GOOD_CALLS)]
    assert [(one.status_code, one.json()) for one in good] == [(202, {"accepted": 1})] * GOOD_CALLS
    written = sent.events.filter(pl.col("tenant_id") == sent.tenant("rest"))
    assert sorted(written["event_id"]) == [f"good-{n}" for n in range(GOOD_CALLS)]


@pages("call", ASK_CALLS)
def test_posted_questions(sent: Sent, call: str) -> None:
    status, kind, _ = ASK_CALLS[call]
    check_problem(sent.answers[f"ask: {call}"], status, kind)
    good = [sent.answers[f"good ask {n}"] for n in range(GOOD_CALLS)]
    told = [(one.status_code, one.json()["outcome"], one.json()["score"]) for one in good]
    assert told == [(200, "predicted", 0.25)] * GOOD_CALLS


def check_problem(answer: httpx.Response, status: int, kind: str) -> None:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["type"] == f"urn:causemesh:problem:{kind}"


# The page.

PAGE = ROOT / "docs" / "bad-input.md"
INPUTS = (
    "truncated bytes",
    "foreign bytes (not framed)",
    "unknown schema id",
    "wrong type",
    "missing tenant",
    "duplicate id",
    "event 40 days old",
    "event from the future",
    "oversize (> 1 MB)",
    "unknown model",
    "missing feature",
    "NaN",
    "expired deadline",
    "a model that errors on one row of a batch",
)


def rows_of_page() -> list[list[str]]:
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[1:]]


def named_tests() -> list[str]:
    return [name for row in rows_of_page() for name in re.findall(r"`(test_[^`]+)`", row[-1])]


def cases(test: Any) -> set[str]:
    """What a test of this module is parametrised by."""
    (mark,) = [mark for mark in test.pytestmark if mark.name == "parametrize"]
    return set(mark.args[1])


def test_the_page_has_exactly_these_rows() -> None:
    assert tuple(row[0] for row in rows_of_page()) == INPUTS
    assert {len(row) for row in rows_of_page()} == {5}


def test_the_page_has_every_reason() -> None:
    coded = {code for row in rows_of_page() for code in re.findall(r"`(\w+)`", row[2])}
    assert coded >= set(REASONS)
    assert coded == {*REASONS, *OUTCOMES}


def test_every_test_on_the_page_exists() -> None:
    assert all("`test_" in row[-1] for row in rows_of_page())
    named = {tuple(name.rstrip("]").split("[")) for name in named_tests()}
    known = {
        (name, case)
        for name, test in globals().items()
        if name.startswith("test_") and hasattr(test, "pytestmark")
        for case in cases(test)
    }
    assert named == known
