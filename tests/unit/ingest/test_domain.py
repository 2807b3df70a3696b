"""What the door refuses, row by row."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
import pytest

from services.ingest.domain import (
    MAX_VALUE_BYTES,
    REASONS,
    Refused,
    Rules,
    decode_code,
    id_digests,
    refusals,
    reject_columns,
)

DAY_US = 86_400_000_000
NOW_US = 1_000 * DAY_US
RULES = Rules(32 * DAY_US, 300_000_000)
INPUTS = pl.List(pl.Struct({"name": pl.String, "value": pl.Float64}))


def frame(**columns: list[Any]) -> pl.DataFrame:
    count = len(next(iter(columns.values())))
    whole = {
        "event_id": ["e"] * count,
        "tenant_id": ["t"] * count,
        "occurred_at": [NOW_US] * count,
        "value": [1.0] * count,
        **columns,
    }
    return pl.DataFrame(whole).with_columns(pl.col("occurred_at").cast(pl.Datetime("us", "UTC")))


def reasons(rows: pl.DataFrame, now_us: int = NOW_US) -> list[str | None]:
    appended = np.full(rows.height, NOW_US)
    now = np.full(rows.height, now_us)
    return refusals(rows, now, appended, RULES).to_list()


def test_only_the_bad_rows_are_refused() -> None:
    nan, infinite = float("nan"), float("inf")
    values = [1.0, nan, None, infinite, -infinite, 0.0]
    bad = "not_a_number"
    assert reasons(frame(value=values)) == [None, bad, None, bad, bad, None]
    assert reasons(frame(tenant_id=["t", "", " \t", "u"])) == [
        None,
        "missing_tenant",
        "missing_tenant",
        None,
    ]
    assert reasons(frame(event_id=["e", "", " "])) == [None, "missing_id", "missing_id"]


def test_the_bounds_of_time_are_exact() -> None:
    oldest, newest = NOW_US - RULES.window_us, NOW_US + RULES.future_tolerance_us
    times = [oldest, oldest - 1, newest, newest + 1]
    assert reasons(frame(occurred_at=times)) == [None, "too_old", None, "from_future"]


def test_a_source_s_own_present_decides_what_is_old() -> None:
    rows = frame(occurred_at=[NOW_US - 40 * DAY_US])
    assert reasons(rows) == ["too_old"]
    assert reasons(rows, now_us=NOW_US - 40 * DAY_US) == [None]


def test_numbers_inside_inputs_count() -> None:
    inputs = [
        [{"name": "a", "value": 1.0}, {"name": "b", "value": float("nan")}],
        [{"name": "a", "value": None}],
        [],
    ]
    rows = frame(value=[1.0] * 3).with_columns(pl.Series("inputs", inputs, dtype=INPUTS))
    assert reasons(rows) == ["not_a_number", None, None]
    many = pl.concat([rows] * 50)  # few rows are looked at one by one
    assert reasons(many) == ["not_a_number", None, None] * 50


def test_of_several_reasons_the_first_is_told() -> None:
    rows = frame(tenant_id=[""], event_id=[""], occurred_at=[0], value=[float("nan")])
    assert reasons(rows) == ["missing_tenant"]
    assert reasons(frame(value=[1.0]).clear()) == []


@pytest.mark.parametrize(
    ("detail", "code"),
    [
        ("oversize: 2000000 bytes, at most 1000000", "oversize"),
        ("schema id 7 is unknown", "unknown_schema"),
        ("schema id 7 is refused: it is recursive", "unknown_schema"),
        ("not framed: a value starts with a zero byte", "not_framed"),
        ("a test.Outage does not belong on inbox.reading", "wrong_record"),
        ("does not decode as test.Reading: EOFError()", "undecodable"),
    ],
)
def test_decoding_failures_have_codes(detail: str, code: str) -> None:
    assert decode_code(detail) == code
    assert code in REASONS


def test_an_id_belongs_to_its_tenant() -> None:
    rows = frame(tenant_id=["t", "u", "t", "t"], event_id=["1", "1", "2", "1"])
    digests = id_digests(rows)
    assert digests[0] == digests[3]
    assert len(set(digests)) == 3


def test_rejects_keep_the_bytes_and_the_claim() -> None:
    refused = Refused({3: ("undecodable", "why"), 1: ("duplicate", "again")}, {1: ("t", "e")})
    values = [b"0", b"1", b"2", b"3"]
    made = reject_columns(refused, [b"k0", None, b"k2", b"k3"], values, np.arange(4))
    assert made.select(
        "reason", "detail", "claimed_id", "original_key", "original_value"
    ).rows() == [
        ("duplicate", "again", "e", None, b"1"),
        ("undecodable", "why", None, b"k3", b"3"),
    ]
    assert made["tenant_id"].to_list() == ["t", "-"]
    assert made["occurred_at"].to_physical().to_list() == [1, 3]


def test_a_reject_is_never_too_large_to_be_read() -> None:
    """The largest of everything stays below the mebibyte that readers take."""
    long = "x" * MAX_VALUE_BYTES
    at_limit, beyond = b"v" * MAX_VALUE_BYTES, b"v" * (MAX_VALUE_BYTES + 1)
    refused = Refused(dict.fromkeys(range(4), ("oversize", "why")), {3: (long, long)})
    keys = [None, None, b"k" * 5_000, None]
    made = reject_columns(refused, keys, [at_limit, beyond, b"v", at_limit], np.arange(4))
    assert [value and len(value) for value in made["original_value"]] == [
        MAX_VALUE_BYTES,
        None,
        1,
        MAX_VALUE_BYTES,
    ]
    assert made["original_key"].to_list() == [None] * 4
    left_out = "why; too large to be kept here: the cause says where it lies"
    assert made["detail"].to_list() == ["why", left_out, left_out, "why"]
    sizes = made.select(
        pl.sum_horizontal(
            pl.col("tenant_id", "detail", "claimed_id").str.len_bytes().fill_null(0),
            pl.col("original_value").bin.size().fill_null(0),
        ).alias("bytes")
    )
    assert sizes["bytes"].max() < (1 << 20) - 8_192
