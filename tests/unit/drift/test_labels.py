"""What an event says of the request it belongs to, and which rules are refused."""

from __future__ import annotations

import polars as pl
import pytest
from polars.exceptions import InvalidOperationError

from causemesh.errors import Misdeclared
from services.drift.domain.labels import LabelRule, label_batch

LANDED = pl.DataFrame(
    {
        "tenant_id": ["UA", "UA", "DL", "DL", "AA"],
        "flight": ["f1", "f2", None, "f4", "f5"],
        "arr_delay": [15.0, 14.9, 80.0, None, 200.0],
        "number": [1, 2, 3, 4, 5],
        "text": ["1", "2", "3", "4", "x"],
        "occurred_at": pl.Series(range(5)).cast(pl.Datetime("us", "UTC")),
    }
)


def rule(positive: str = "arr_delay >= 15", request_id: str = "flight") -> LabelRule:
    return LabelRule("flights.landed", request_id, positive)


def test_labels_of_a_batch() -> None:
    labels = label_batch(rule(), LANDED)
    times = LANDED["occurred_at"].to_list()
    assert labels.rows() == [
        ("UA", "f1", True, times[0]),
        ("UA", "f2", False, times[1]),
        ("AA", "f5", True, times[4]),
    ]
    assert labels.schema == pl.Schema(
        {
            "tenant_id": pl.String,
            "request_id": pl.String,
            "positive": pl.Boolean,
            "occurred_at": pl.Datetime("us", "UTC"),
        }
    )


def test_the_same_rule_has_the_same_digest_and_another_has_not() -> None:
    assert rule().digest == rule().digest
    others = {rule("arr_delay >= 16").digest, rule(request_id="text").digest}
    assert len({rule().digest, *others}) == 3


def test_an_empty_batch_has_the_same_columns() -> None:
    assert label_batch(rule(), LANDED.clear()).schema == label_batch(rule(), LANDED).schema


def test_a_number_may_be_the_request_id() -> None:
    assert label_batch(rule(request_id="number"), LANDED)["request_id"].to_list() == list("1235")


def test_labels_do_not_depend_on_chunks() -> None:
    parts = [label_batch(rule(), LANDED[:2]), label_batch(rule(), LANDED[2:])]
    assert pl.concat(parts).equals(label_batch(rule(), LANDED))


@pytest.mark.parametrize(
    "positive",
    [
        "arr_delay >= 15 and not text = 'sum(x)'",
        "coalesce(arr_delay, 0) > 15",
        "text in ('1', '2')",
        "case when arr_delay > 1 then true else false end",
        "round(abs(arr_delay)) > 15",
        '"arr_delay" between 1 and 2',
        "arr_delay is not null",
    ],
)
def test_expressions_of_one_event_are_taken(positive: str) -> None:
    whole = label_batch(rule(positive), LANDED)
    one_by_one = pl.concat([label_batch(rule(positive), LANDED[i]) for i in range(len(LANDED))])
    assert whole.equals(one_by_one)


@pytest.mark.parametrize(
    ("positive", "message"),
    [
        ("arr_delay > avg(arr_delay)", "'avg'"),
        ("arr_delay > SUM (arr_delay)", "'SUM'"),
        ('arr_delay > "sum"(arr_delay)', "no function of a single event"),
        ("arr_delay > `sum`(arr_delay)", "backtick"),
        ("arr_delay > sum/**/(arr_delay)", "comment"),
        ("lag(arr_delay) over (order by arr_delay) > 1", "'lag'"),
        ("arr_delay > (select 1)", "'select'"),
        ("when_due < current_date", "'current_date'"),
        ("arr_delay >", "is no SQL expression"),
        ("1 = 1", "reads no column"),
    ],
)
def test_other_expressions_are_refused(positive: str, message: str) -> None:
    with pytest.raises(Misdeclared, match=message):
        rule(positive)


def test_a_rule_that_does_not_fit_the_event_is_refused() -> None:
    with pytest.raises(Misdeclared, match="no column 'request'"):
        label_batch(rule(request_id="request"), LANDED)
    with pytest.raises(Misdeclared, match="delay_arr"):
        label_batch(rule("delay_arr > 15"), LANDED)
    with pytest.raises(Misdeclared, match="cannot compare string with numeric"):
        label_batch(rule("text > 15"), LANDED)
    with pytest.raises(Misdeclared, match="is a Float64; write a comparison"):
        label_batch(rule("arr_delay"), LANDED)


def test_a_value_that_fails_is_no_fault_of_the_rule() -> None:
    casting = rule("cast(text as int) > 1")
    assert len(label_batch(casting, LANDED[:4])) == 3
    with pytest.raises(InvalidOperationError):
        label_batch(casting, LANDED)
