"""Which retention will do, and which stored positions the log still holds."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from causemesh.bus.pulsar_ids import packed_one
from causemesh.bus.pulsar_retention import HeldPositions, check_namespace, minutes_of, policy
from causemesh.catalogue import Topic
from causemesh.errors import Gone, Misdeclared, Retryable

RECORD: dict[str, Any] = {"type": "record", "name": "Row", "namespace": "t", "fields": []}
WEEK = 7 * 1_440


def topic(form: Any = "fact") -> Topic:
    return Topic("a", form, RECORD, "k", "o", (), (), (), 1, 7, "NONE", "")


def kept(minutes: int, megabytes: int = -1) -> dict[str, int]:
    return {"retentionTimeInMinutes": minutes, "retentionSizeInMB": megabytes}


def test_facts_have_their_days_and_states_stay() -> None:
    assert minutes_of(topic()) == WEEK
    assert minutes_of(topic("state")) == -1
    assert policy(WEEK) == kept(WEEK)


@pytest.mark.parametrize("found", [kept(WEEK), kept(WEEK + 1), kept(-1), None])
def test_a_namespace_that_keeps_enough_will_do(found: Any) -> None:
    check_namespace(found, topic())


@pytest.mark.parametrize("found", [kept(WEEK - 1), kept(0), kept(WEEK, 100), kept(-1, 0)])
def test_a_namespace_that_keeps_less_is_refused(found: Any) -> None:
    with pytest.raises(Misdeclared, match="turn on topicLevelPoliciesEnabled"):
        check_namespace(found, topic())


def test_states_need_a_namespace_that_keeps_all() -> None:
    check_namespace(kept(-1), topic("state"))
    with pytest.raises(Misdeclared):
        check_namespace(kept(10 * WEEK), topic("state"))


PATH = "/admin/v2/persistent/public/default/a-partition-0/internalStats"


def held(told: dict[str, Any] | None) -> HeldPositions:
    def answer(request: httpx.Request) -> httpx.Response:
        assert request.url.path == PATH
        return httpx.Response(404) if told is None else httpx.Response(200, json=told)

    return HeldPositions("http://pulsar", httpx.MockTransport(answer))


def stats(ledgers: list[int], last: str, entries: int) -> dict[str, Any]:
    listed = [{"ledgerId": one, "entries": 1} for one in ledgers]
    return {"ledgers": listed, "lastConfirmedEntry": last, "numberOfEntries": entries}


AT = packed_one(5, 3, 7)


@pytest.mark.parametrize(
    "found",
    [
        pytest.param(stats([5, 8], "8:0", 9), id="its ledger is there"),
        pytest.param(stats([8], "5:3", 0), id="it was the last record ever"),
        pytest.param(stats([8], "8:-1", 0), id="nobody can tell"),
    ],
)
def test_a_position_that_may_be_gone_on_from(found: dict[str, Any]) -> None:
    held(found).check("a-partition-0", AT)


def test_the_place_before_a_ledgers_first_record_is_held_with_it() -> None:
    before = packed_one(8, 0, 0) - 1
    held(stats([8, 9], "9:0", 9)).check("a-partition-0", before)
    with pytest.raises(Gone):
        held(stats([9], "9:0", 9)).check("a-partition-0", before)


@pytest.mark.parametrize("found", [stats([8], "8:0", 1), stats([8], "5:4", 1)])
def test_a_position_whose_ledger_is_gone_from_a_log_with_records(found: dict[str, Any]) -> None:
    with pytest.raises(Gone, match="ledger 5 of a-partition-0 was deleted"):
        held(found).check("a-partition-0", AT)


def test_a_partition_that_is_not_known_is_waited_for() -> None:
    with pytest.raises(Retryable):
        held(None).check("a-partition-0", AT)
