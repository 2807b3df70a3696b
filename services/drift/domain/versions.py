"""What drift makes of a registered model version."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import polars as pl

from causemesh.errors import Misdeclared
from services.drift.domain.histograms import Signature
from services.drift.domain.labels import LabelRule, label_batch


@dataclass(frozen=True)
class Version:
    """A model version; `problem` says why its `signature` or its `rule` can't be used.

    A registration that drift can't use must not stop it for all other models, so it is kept with
    its problem, for people to see, and measured as far as it can be.
    """

    model: str
    version: int
    sequence: int
    signature: Signature | None
    rule: LabelRule | None
    problem: str | None = None


def read_version(record: Mapping[str, Any], events: Mapping[str, pl.DataFrame]) -> Version:
    """Read a ModelVersionRegistered record; `events` holds an empty frame of each event type."""
    problems = []
    signature = rule = None
    try:
        signature = Signature.from_record(record)
    except Misdeclared as error:
        problems.append(str(error))
    try:
        rule = _rule(record["label"], events)
    except Misdeclared as error:
        problems.append(str(error))
    problem = "; ".join(problems) or None
    return Version(record["model"], record["version"], record["sequence"], signature, rule, problem)


def _rule(label: Mapping[str, str] | None, events: Mapping[str, pl.DataFrame]) -> LabelRule | None:
    if label is None:
        return None
    rule = LabelRule(label["event_type"], label["request_id"], label["positive"])
    if rule.event_type not in events:
        raise Misdeclared(
            f"label: no event type {rule.event_type!r} in the project; it has {sorted(events)}"
        )
    label_batch(rule, events[rule.event_type])
    return rule
