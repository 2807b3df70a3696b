"""Versions, schedules, and one outcome for every task."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
import pytest

from causemesh.errors import Misdeclared
from services.inference.domain import (
    Champion,
    ModelVersion,
    Outcomes,
    checked_schedule,
    groups,
    matrix,
)

VERSION = ModelVersion(
    "m", 3, "realtime", ("v.a", "input.x"), ("input.x",), "sha", None, [], {"auc": 0.7}
)
NOW_US = 1_000


def tasks(count: int, **columns: list[Any]) -> pl.DataFrame:
    whole = {
        "tenant_id": ["t"] * count,
        "occurred_at": [0] * count,
        "request_id": [f"r{n}" for n in range(count)],
        "model": ["m"] * count,
        "version": [3] * count,
        "vector": [b"\0" * 8] * count,
        "failure": [None] * count,
        "expires_at": [None] * count,
        **columns,
    }
    time = pl.Datetime("us", "UTC")
    return pl.DataFrame(
        whole, schema_overrides={"failure": pl.String, "expires_at": pl.Int64, "version": pl.Int32}
    ).with_columns(pl.col("occurred_at", "expires_at").cast(time))


def test_a_version_that_fits_passes() -> None:
    VERSION.check()
    assert VERSION.deployment == "m.v3"
    assert VERSION.record(9)["sequence"] == 9
    assert VERSION.record(9)["metrics"] == [{"name": "auc", "value": 0.7}]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": (), "required": ()}, "at least one feature"),
        ({"features": ("v.a", "v.a"), "required": ()}, r"named twice: \['v.a'\]"),
        ({"features": ("a",), "required": ()}, r"view.feature or input.name, not \['a'\]"),
        ({"required": ("v.z",)}, r"no features: \['v.z'\]"),
    ],
)
def test_a_version_that_does_not_fit_says_why(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(Misdeclared, match=message):
        replace(VERSION, **changes).check()


def test_schedules_are_sorted_and_checked() -> None:
    late, early = Champion(2, 200), Champion(1, 100)
    assert checked_schedule([late, early], [1, 2]) == [early, late]
    assert checked_schedule([], []) == []
    with pytest.raises(Misdeclared, match=r"versions \[2\] are not registered; known: \[1\]"):
        checked_schedule([late, early], [1])
    with pytest.raises(Misdeclared, match="one effective_at"):
        checked_schedule([early, Champion(2, 100)], [1, 2])


def test_failures_and_deadlines_need_no_model() -> None:
    frame = tasks(
        5,
        failure=[None, "missing_feature: v.a", None, "unknown_model: x", None],
        expires_at=[None, None, NOW_US, NOW_US - 1, NOW_US + 1],
    )
    made = Outcomes.of(frame, NOW_US)
    assert made.outcome.tolist() == [None, "failed", "expired", "failed", None]
    assert made.reason[1] == "missing_feature: v.a"
    assert made.open.tolist() == [True, False, False, False, True]


def test_every_row_gets_one_outcome() -> None:
    frame = tasks(4, failure=["missing_feature: v.a", None, None, None])
    made = Outcomes.of(frame, NOW_US)
    made.predict(np.array([1, 3]), np.array([0.25, np.inf]), 1.5)
    made.fail(np.array([2]), "model_error: no")
    result = made.frame(frame, "realtime", NOW_US)
    assert result.select("request_id", "outcome", "score", "compute_ms").rows() == [
        ("r0", "failed", None, 0.0),
        ("r1", "predicted", 0.25, 1.5),
        ("r2", "failed", None, 0.0),
        ("r3", "failed", None, 1.5),
    ]
    assert result["reason"].to_list() == [
        "missing_feature: v.a",
        None,
        "model_error: no",
        "not_a_number: the model answered NaN or infinity",
    ]


def test_groups_cover_the_rows_once() -> None:
    frame = tasks(7, model=["a", "b", "a", "a", "b", "a", "c"], version=[1, 1, 1, 2, 1, 1, 1])
    rows = np.array([0, 1, 2, 3, 4, 5])
    found = [(model, version, part.tolist()) for model, version, part in groups(frame, rows, 2)]
    assert found == [
        ("a", 1, [0, 2]),
        ("a", 1, [5]),
        ("b", 1, [1, 4]),
        ("a", 2, [3]),
    ]


def test_vectors_as_rows() -> None:
    vectors = [np.array(row, "<f4").tobytes() for row in ([1, 2], [3, 4])]
    assert matrix(vectors, 2).tolist() == [[1, 2], [3, 4]]
