"""What the door refuses, decided on columns. Pure: no I/O and no clock."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from causemesh.catalogue import NO_TENANT
from causemesh.series import Int64s, Mask, int64s

MAX_VALUE_BYTES = 1_000_000
"""The largest record that is let in. What is made from it has a longer envelope, and every reader
of the mesh takes 1 MiB at most."""
_MAX_KEY_BYTES = 4_096
_MAX_NAME = 1_024
_FEW = 32  # so few rows cost less one by one than the query engine does a call (measured)
_LEFT_OUT = "; too large to be kept here: the cause says where it lies"

REASONS = {
    "oversize": f"a value is larger than {MAX_VALUE_BYTES} bytes",
    "unknown_schema": "the schema id is not at the registry, or its schema is refused",
    "not_framed": "the value does not start with a zero byte and a schema id",
    "wrong_record": "the value holds another record than the topic's",
    "undecodable": "the bytes do not decode with their schema",
    "missing_tenant": "tenant_id is empty",
    "missing_id": "event_id is empty",
    "too_old": "the event is older than the deduplication window",
    "from_future": "the event's time is ahead of the broker's clock",
    "not_a_number": "a number is NaN or infinite; leave it null instead",
    "duplicate": "an event with this id was accepted before",
}
"""Every reason on ingest.rejects.v1, for docs/bad-input.md."""

_DECODE_CODES = (
    ("oversize", "oversize"),
    ("schema id", "unknown_schema"),
    ("not framed", "not_framed"),
    ("a ", "wrong_record"),
)


@dataclass(frozen=True)
class Rules:
    """The door's bounds, microseconds."""

    window_us: int
    future_tolerance_us: int


def decode_code(detail: str) -> str:
    """The reason code of a decoder's message."""
    return next((code for start, code in _DECODE_CODES if detail.startswith(start)), "undecodable")


def refusals(frame: pl.DataFrame, now_us: Int64s, appended_us: Int64s, rules: Rules) -> pl.Series:
    """The reason code of each row, null where the row is good.

    `now_us` is each row's present in event time (the watermark in force, or the append time),
    `appended_us` the broker's append time; both microseconds. The first reason that holds wins.
    """
    occurred = int64s(frame["occurred_at"])
    checks = [
        ("missing_tenant", _blank(frame["tenant_id"])),
        ("missing_id", _blank(frame["event_id"])),
        ("too_old", occurred < now_us - rules.window_us),
        ("from_future", occurred > appended_us + rules.future_tolerance_us),
        ("not_a_number", _not_numbers(frame)),
    ]
    codes = np.full(frame.height, None, dtype=object)
    for name, holds in reversed(checks):
        codes[holds] = name
    return pl.Series("reason", codes.tolist(), dtype=pl.String)


def _blank(texts: pl.Series) -> Mask:
    """Where a text is empty or only white space."""
    stripped = list(map(str.strip, texts.to_list()))
    if all(stripped):
        return np.zeros(len(stripped), dtype=bool)
    return np.array([not text for text in stripped], dtype=bool)


def _not_numbers(frame: pl.DataFrame) -> Mask:
    wrong = np.zeros(frame.height, dtype=bool)
    for column in frame.get_columns():
        if column.dtype.is_float():
            wrong |= _not_finite(column)
    if "inputs" in frame.columns:
        inputs = frame["inputs"]
        if frame.height <= _FEW:
            wrong |= np.array([_has_not_number(row) for row in inputs.to_list()], dtype=bool)
            return wrong
        values = inputs.explode().struct.unnest()["value"]
        if _not_finite(values).any():
            named = pl.element().struct.field("value")
            found = inputs.list.eval(~named.is_finite()).list.any()
            wrong |= found.fill_null(False).to_numpy()
    return wrong


def _has_not_number(inputs: Sequence[Mapping[str, Any]] | None) -> bool:
    numbers = (pair["value"] for pair in inputs or () if pair is not None)
    return any(number is not None and not math.isfinite(number) for number in numbers)


def _not_finite(values: pl.Series) -> Mask:
    """Where a number is NaN or infinite; a null is neither."""
    finite: Mask = np.isfinite(values.to_numpy())  # a null comes out as NaN
    return ~finite & values.is_not_null().to_numpy() if values.null_count() else ~finite


def id_digests(frame: pl.DataFrame) -> list[bytes]:
    """The 128-bit BLAKE2b of tenant and event id, one a row."""
    named = zip(frame["tenant_id"].to_list(), frame["event_id"].to_list(), strict=True)
    return [
        hashlib.blake2b(f"{tenant}\x1f{event_id}".encode(), digest_size=16).digest()
        for tenant, event_id in named
    ]


@dataclass(frozen=True)
class Refused:
    """Rows of one raw batch that the door refused: by raw row, reason code and detail."""

    rows: Mapping[int, tuple[str, str]]
    claimed: Mapping[int, tuple[str, str]]
    """Raw row to the (tenant, event id) that the record claims, where it could be read."""


def reject_columns(
    refused: Refused,
    keys: Sequence[bytes | None],
    values: Sequence[bytes | None],
    appended_us: Int64s,
) -> pl.DataFrame:
    """The columns of EventRejected, in raw row order.

    A reject must be readable itself: bytes that are too many for that are left out.
    """
    rows = sorted(refused.rows)
    nobody = (NO_TENANT, None)
    claims = [refused.claimed.get(row, nobody) for row in rows]
    kept_keys = [_kept(keys[row], _MAX_KEY_BYTES) for row in rows]
    kept_values = [_kept(values[row], MAX_VALUE_BYTES) for row in rows]
    details = [
        refused.rows[row][1] + ("" if (key, value) == (keys[row], values[row]) else _LEFT_OUT)
        for row, key, value in zip(rows, kept_keys, kept_values, strict=True)
    ]
    return pl.DataFrame(
        {
            "tenant_id": pl.Series(
                [(tenant or NO_TENANT)[:_MAX_NAME] for tenant, _ in claims], dtype=pl.String
            ),
            "occurred_at": pl.Series(appended_us[rows]).cast(pl.Datetime("us", "UTC")),
            "reason": pl.Series([refused.rows[row][0] for row in rows], dtype=pl.String),
            "detail": pl.Series(details, dtype=pl.String),
            "claimed_id": pl.Series(
                [claim and claim[:_MAX_NAME] for _, claim in claims], dtype=pl.String
            ),
            "original_key": pl.Series(kept_keys, dtype=pl.Binary),
            "original_value": pl.Series(kept_values, dtype=pl.Binary),
        }
    )


def _kept(part: bytes | None, at_most: int) -> bytes | None:
    return part if part is not None and len(part) <= at_most else None
