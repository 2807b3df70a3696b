"""Which version answers when, and how a vector is put together."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

from services.features.domain.models import (
    UNRESOLVED,
    ModelBook,
    Signature,
    full_vectors,
    named_values,
)

NAN = float("nan")


def version(number: int, features: list[str] | None = None, **more: Any) -> dict[str, Any]:
    row = {"model": "m", "version": number, "lane": "realtime", "required": [], "sequence": number}
    return {**row, "features": features or ["v.a"], **more}


def rollout(sequence: int, *schedule: tuple[int, int]) -> dict[str, Any]:
    entries = [{"version": number, "effective_at": at_us} for number, at_us in schedule]
    return {"model": "m", "schedule": entries, "sequence": sequence}


def resolved(book: ModelBook, *asked: tuple[str, int | None, int]) -> list[tuple[Any, ...]]:
    """(model, pinned version, time) of each request to (version, signature, failure)."""
    frame = pl.DataFrame(
        list(asked),
        schema={"model": pl.String, "version": pl.Int32, "occurred_at_us": pl.Int64},
        orient="row",
    )
    return book.resolve(frame).rows()


def book(*numbers: int) -> ModelBook:
    made = ModelBook(["v.a", "v.b"])
    made.add_versions([version(number) for number in numbers])
    return made


def test_the_schedule_decides_as_of_the_request_s_own_time() -> None:
    made = book(1, 2)
    made.add_rollouts([rollout(5, (2, 200), (1, 100))])
    asked = [("m", None, at_us) for at_us in (99, 100, 199, 200, 10**15)]
    none = "unknown_model: no version m@0"
    assert resolved(made, *asked) == [
        (0, UNRESOLVED, none),
        (1, "m@1", None),
        (1, "m@1", None),
        (2, "m@2", None),
        (2, "m@2", None),
    ]


def test_a_pinned_version_needs_no_schedule() -> None:
    made = book(1, 2)
    made.add_rollouts([rollout(5, (2, 0))])
    assert resolved(made, ("m", 1, 50), ("m", 3, 50), ("other", None, 50)) == [
        (1, "m@1", None),
        (3, UNRESOLVED, "unknown_model: no version m@3"),
        (0, UNRESOLVED, "unknown_model: no version other@0"),
    ]


def test_the_highest_sequence_wins_in_any_order() -> None:
    for order in ((5, 6), (6, 5)):
        made = book(1, 2)
        for sequence in order:
            made.add_rollouts([rollout(sequence, (sequence - 4, 0))])
        assert resolved(made, ("m", None, 1)) == [(2, "m@2", None)]


def test_a_version_with_an_unknown_feature_fails_by_name() -> None:
    made = book()
    assert made.add_versions([version(1, ["v.a", "w.z", "input.x"])]) == []
    assert resolved(made, ("m", 1, 0)) == [(1, UNRESOLVED, "unknown_feature: w.z")]


def test_a_version_never_changes() -> None:
    made = book(1)
    assert made.add_versions([version(1, ["v.b"])]) == []
    assert made.signatures["m@1"].features == ("v.a",)


def test_what_is_dumped_is_loaded() -> None:
    made = book(1)
    made.add_versions([version(2, ["w.z"])])
    made.add_rollouts([rollout(3, (1, 100), (2, 200))])
    again = ModelBook(["v.a", "v.b"])
    again.load(made.dump())
    assert again.signatures == made.signatures
    assert again.rollouts == made.rollouts
    assert again.broken == made.broken != {}


def test_a_view_that_was_added_mends_a_broken_version() -> None:
    made = book()
    made.add_versions([version(1, ["w.z"])])
    again = ModelBook(["v.a", "w.z"])
    again.load(made.dump())
    assert resolved(again, ("m", 1, 0)) == [(1, "m@1", None)]


def test_named_values_become_columns() -> None:
    pairs = [
        [{"name": "b", "value": 2.0}, {"name": "a", "value": 1.0}],
        [],
        [{"name": "z", "value": 9.0}, {"name": "a", "value": None}],
    ]
    kind = pl.List(pl.Struct({"name": pl.String, "value": pl.Float64}))
    found = named_values(pl.Series(pairs, dtype=kind), ["a", "b", "c"], pl.Float64)
    assert found.rows() == [(1.0, 2.0, None), (None, None, None), (None, None, None)]


def test_the_last_of_two_values_under_one_name_counts() -> None:
    pairs = [[{"name": "a", "value": 1.0}, {"name": "a", "value": 2.0}]]
    kind = pl.List(pl.Struct({"name": pl.String, "value": pl.Float64}))
    assert named_values(pl.Series(pairs, dtype=kind), ["a"], pl.Float64).rows() == [(2.0,)]


def floats(*rows: tuple[float, ...]) -> list[bytes]:
    return [np.array(row, "<f4").tobytes() for row in rows]


def test_vectors_are_in_the_signature_s_order() -> None:
    features = ("input.x", "v.a", "input.y", "v.b")
    signature = Signature("m", 1, "realtime", features, ("v.b", "input.x"), 1)
    assert signature.view_features == ("v.a", "v.b")
    assert signature.inputs == ("x", "y")
    views = floats((1, 2), (1, NAN), (NAN, NAN), (NAN, 2))
    inputs = floats((10, 20), (10, 20), (NAN, 20), (10, NAN))
    vectors, missing = full_vectors(signature, views, inputs)
    assert vectors == floats(
        (10, 1, 20, 2), (10, 1, 20, NAN), (NAN, NAN, 20, NAN), (10, NAN, NAN, 2)
    )
    assert missing == [None, "missing_feature: v.b", "missing_feature: v.b", None]


def test_vectors_of_one_kind_only() -> None:
    empty = [b"", b""]
    of_inputs = Signature("m", 1, "realtime", ("input.x",), (), 1)
    assert full_vectors(of_inputs, empty, floats((1,), (2,)))[0] == floats((1,), (2,))
    of_views = Signature("m", 2, "realtime", ("v.a",), (), 1)
    assert full_vectors(of_views, floats((1,), (2,)), empty)[0] == floats((1,), (2,))
