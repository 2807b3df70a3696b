"""What a producer sends again is told apart from what it spoiled on purpose."""

from __future__ import annotations

import polars as pl

from examples.flights.checking import rejects_are_the_defects, repeats_in
from examples.flights.dataset import Defects

DEFECTS = Defects(duplicates=1, nameless=1)


def inbox(*ids: str) -> pl.DataFrame:
    """Rows of one topic; an id that ends in "?" has no tenant."""
    tenants = ["" if one.endswith("?") else "UA" for one in ids]
    return pl.DataFrame({"event_id": ids, "tenant_id": tenants})


def test_what_was_written_once_has_no_repeats() -> None:
    written = [inbox("a", "b", "b", "c?"), inbox("r1", "r2")]
    assert repeats_in(written, DEFECTS) == Defects(0, 0)


def test_what_was_written_again_is_counted() -> None:
    written = [inbox("a", "b", "b", "c?", "a", "b", "b", "c?"), inbox("r1", "r2", "r1")]
    assert repeats_in(written, DEFECTS) == Defects(duplicates=4, nameless=1)


def test_the_door_must_refuse_each_of_them() -> None:
    repeats = Defects(duplicates=4, nameless=1)
    whole = {"duplicate": 5, "missing_tenant": 2}
    assert rejects_are_the_defects(whole, DEFECTS, repeats).passed
    assert not rejects_are_the_defects({**whole, "duplicate": 4}, DEFECTS, repeats).passed
    assert not rejects_are_the_defects({**whole, "other": 1}, DEFECTS, repeats).passed
    assert not rejects_are_the_defects(whole, DEFECTS, Defects(0, 0)).passed
