"""What is made of a registration, and that one that can't be used harms no other."""

from __future__ import annotations

from typing import Any

import polars as pl
import pytest

from services.drift.domain.versions import read_version

EVENTS = {
    "landed": pl.DataFrame(
        schema={
            "tenant_id": pl.String,
            "occurred_at": pl.Datetime("us", "UTC"),
            "flight": pl.String,
            "late": pl.Boolean,
        }
    )
}
LABEL = {"event_type": "landed", "request_id": "flight", "positive": "late"}


def record(**changes: Any) -> dict[str, Any]:
    return {
        "model": "m",
        "version": 3,
        "sequence": 9,
        "features": ["x"],
        "reference": [{"column": "x", "edges": [1.0], "counts": [1, 2, 0]}],
        "label": LABEL,
    } | changes


def test_a_good_registration() -> None:
    version = read_version(record(), EVENTS)
    assert (version.model, version.version, version.sequence, version.problem) == ("m", 3, 9, None)
    assert version.signature is not None
    assert version.signature.features == ("x",)
    assert version.rule is not None
    assert version.rule.event_type == "landed"


def test_no_label_is_no_problem() -> None:
    version = read_version(record(label=None), EVENTS)
    assert (version.rule, version.problem) == (None, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"event_type": "gone"}, "no event type 'gone'"),
        ({"positive": "late >"}, "is no SQL expression"),
        ({"positive": "delayed"}, "delayed"),
        ({"request_id": "nowhere"}, "no column 'nowhere'"),
    ],
)
def test_a_rule_that_does_not_fit_costs_the_labels_only(
    change: dict[str, str], message: str
) -> None:
    version = read_version(record(label=LABEL | change), EVENTS)
    assert version.signature is not None
    assert version.rule is None
    assert message in (version.problem or "")


def test_a_reference_that_does_not_fit_costs_the_histograms_only() -> None:
    bad = [{"column": "x", "edges": [1.0], "counts": [1]}]
    version = read_version(record(reference=bad), EVENTS)
    assert version.signature is None
    assert version.rule is not None
    assert "1 edges need 3 counts" in (version.problem or "")
