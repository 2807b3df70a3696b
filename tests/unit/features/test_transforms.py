"""On-demand features: what they compute, what they need, and which definitions are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from causemesh.errors import Misdeclared
from services.features.domain.failures import DefinitionError
from services.features.domain.models import ModelBook, full_vectors
from services.features.domain.transforms import Transforms, parse_transforms
from services.features.domain.vectors import row_bytes

KNOWN = ["v.a", "v@v1.a", "v@v2.a", "v.b", "v@v1.b"]
GROUPS = {
    "ratios": {
        "much": "ratios.per_mile > 2 AND input.kind = 1",
        "per_mile": "v.a / input.miles",
        "safe": "coalesce(v.b, -1)",
    },
    "ratios@v2": {"per_mile": "v@v2.a / input.miles * 1.5"},
}
NAN = float("nan")


def transforms(groups: dict[str, Any] = GROUPS) -> Transforms:
    return parse_transforms({"on_demand": groups}, KNOWN)


def version(*features: str) -> dict[str, Any]:
    return {
        "model": "m", "version": 1, "lane": "realtime", "features": features,
        "required": [features[0]], "sequence": 1,
    }  # fmt: skip


def vectors_of(book: ModelBook, views: list[list[float]], inputs: list[list[float]]) -> Any:
    packed = [row_bytes(np.array(rows, "<f4")) for rows in (views, inputs)]
    found, missing = full_vectors(book.signatures["m@1"], *packed, book.transforms)
    return [np.frombuffer(row, "<f4").tolist() for row in found], missing


def test_a_model_asks_for_an_on_demand_feature_as_for_any_other() -> None:
    book = ModelBook(KNOWN, transforms())
    asked = ["ratios.much", "v.b", "ratios@v2.per_mile", "ratios.safe", "input.kind"]
    (signature,) = book.add_versions([version(*asked)])
    assert signature.view_features == ("v.a", "v.b", "v@v2.a")
    assert signature.inputs == ("miles", "kind")
    views = [[10, 1, 2], [10, NAN, 2], [NAN, 1, 2], [10, 1, 2]]
    inputs = [[4, 1], [5, 1], [5, 1], [0, 1]]
    found, missing = vectors_of(book, views, inputs)
    assert found[0] == [1.0, 1.0, 0.75, 1.0, 1.0]
    assert found[1][0] == 0.0
    assert found[1][3] == -1.0  # a missing value is null, and coalesce knows another
    assert np.isnan(found[2][0])
    assert np.isnan(found[3][2])  # divided by zero: missing, not infinite
    assert found[3][0] == 1.0
    assert missing == [None, None, "missing_feature: ratios.much", None]


@given(st.lists(st.tuples(st.floats(-1e6, 1e6), st.floats(0.5, 1e3)), min_size=1, max_size=70))
def test_a_row_has_its_value_whatever_it_comes_with(rows: list[tuple[float, float]]) -> None:
    made = transforms({"g": {"x": "round(v.a / input.m, 3) + ln(input.m)"}})
    matrix = np.array(rows, np.float32)
    whole = made.compute(["g.x"], ["v.a", "input.m"], matrix)
    singly = [
        made.compute(["g.x"], ["v.a", "input.m"], matrix[n : n + 1]) for n in range(len(rows))
    ]
    assert whole.tobytes() == np.concatenate(singly).tobytes()


@pytest.mark.parametrize(
    ("groups", "says"),
    [
        ({"g": {"x": "g.y + 1", "y": "g.z * 2", "z": "g.x"}}, "read each other: g"),
        ({"g": {"x": "g.x + v.a"}}, "read each other: g"),
        ({"g": {"x": "g@v1.x + v.a"}}, "read each other: g"),
        ({"g": {"x": "v.missing + 1"}}, "unknown 'v.missing'"),
        ({"g": {"x": "v@v9.a + 1"}}, "unknown 'v@v9.a'"),
        ({"g": {"x": "v.a - avg(v.a)"}}, "'avg'"),
        ({"g": {"x": "v.a +"}}, "no SQL expression"),
        ({"g": {"x": "1"}}, "reads no column"),
        ({"g": {"x": "starts_with(v.a, 'b')"}}, "'g@v1.x'"),
        ({"v": {"x": "input.a"}}, "name of a view"),
        ({"input": {"x": "v.a"}}, "is `input`"),
        ({"G": {"x": "v.a"}}, "must be a name"),
        ({"g": ["v.a"]}, "must be a name"),
        ({"g": {"Bad Name": "v.a"}}, "misnamed"),
        ({"g": {"x": "v.a"}, "g@v1": {"x": "v.b"}}, "defined twice"),
    ],
)
def test_a_mistake_is_refused(groups: dict[str, Any], says: str) -> None:
    with pytest.raises(DefinitionError) as refused:
        transforms(groups)
    assert says in str(refused.value)


def test_text_in_quotes_is_no_name() -> None:
    made = transforms({"g": {"x": "CASE WHEN 'v.zzz' = 'v.zzz' THEN v.a ELSE 0 END"}})
    assert made.sources(["g.x"]) == ("v.a",)


def test_a_changed_expression_under_its_name_is_refused_when_state_is_restored() -> None:
    book = ModelBook(KNOWN, transforms())
    book.add_versions([version("ratios.per_mile", "v.a")])
    saved = book.dump()
    ModelBook(KNOWN, transforms()).load(saved)
    changed = {**GROUPS, "ratios": {**GROUPS["ratios"], "per_mile": "v.b / input.miles"}}
    with pytest.raises(Misdeclared, match="give it a version"):
        ModelBook(KNOWN, transforms(changed)).load(saved)
    ModelBook(KNOWN, transforms({**GROUPS, "more": {"x": "v.a + 1"}})).load(saved)
