"""A fetch session names what has moved, forgets what we no longer read, and begins anew when it
must."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from causemesh.bus.kafka_fetch import FetchSession, fetched
from causemesh.errors import Fatal

BOTH = {("t", 0): 5, ("t", 1): 7}
NEWEST = {1: (4, 17)}


def asked(session: FetchSession, after: dict[tuple[str, int], int]) -> Any:
    return session.request(after, 0.5).prepare(NEWEST)


def offsets(request: Any) -> dict[tuple[str, int], int]:
    return {(topic, row[0]): row[2] for topic, partitions in request.topics for row in partitions}


def answer(session_id: int, error: int = 0) -> Any:
    return SimpleNamespace(error_code=error, session_id=session_id, topics=[])


def test_only_what_has_moved_is_named_again() -> None:
    session = FetchSession()
    first = asked(session, BOTH)
    assert (first.session_id, first.session_epoch, offsets(first)) == (0, 0, BOTH)
    assert session.accept(answer(9)) == 0
    second = asked(session, {**BOTH, ("t", 1): 8})
    assert (second.session_id, second.session_epoch) == (9, 1)
    assert offsets(second) == {("t", 1): 8}
    assert session.accept(answer(9)) == 0
    third = asked(session, {("t", 1): 8})
    assert (third.session_epoch, offsets(third)) == (2, {})
    assert third.forgotten_topics_data == [("t", [0])]


@pytest.mark.parametrize("refused", [70, 71])
def test_a_session_that_is_refused_begins_anew(refused: int) -> None:
    session = FetchSession()
    asked(session, BOTH)
    session.accept(answer(9))
    asked(session, BOTH)
    assert session.accept(answer(0, refused)) == refused
    again = asked(session, BOTH)
    assert (again.session_id, again.session_epoch, offsets(again)) == (0, 0, BOTH)


def test_a_broker_that_keeps_no_session_for_us_is_told_all_each_time() -> None:
    session = FetchSession()
    for _ in range(3):
        request = asked(session, BOTH)
        assert (request.session_id, request.session_epoch, offsets(request)) == (0, 0, BOTH)
        assert session.accept(answer(0)) == 0


def test_a_broker_that_is_too_old_is_named() -> None:
    with pytest.raises(Fatal, match=r"2\.4 or later"):
        FetchSession().request(BOTH, 0.5).prepare({1: (0, 10)})


def test_partitions_of_an_answer() -> None:
    topics = [("t", [(0, 0, 9, 9, 0, None, -1, b"abc"), (1, 3, -1, -1, -1, None, -1, None)])]
    assert [(one.source, one.error, one.records, one.end) for one in fetched(topics)] == [
        (("t", 0), 0, b"abc", 9),
        (("t", 1), 3, b"", -1),
    ]
