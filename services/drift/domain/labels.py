"""Labels from later events: what really happened to a request."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import polars as pl
from polars.exceptions import PolarsError

from causemesh.errors import Misdeclared
from causemesh.expressions import check_expression


@dataclass(frozen=True)
class LabelRule:
    """How an event of `event_type` labels a request.

    `request_id` is the event's column with the request's id, `positive` an SQL expression over
    that one event. Raises Misdeclared for an expression that can't be a label.
    """

    event_type: str
    request_id: str
    positive: str

    def __post_init__(self) -> None:
        problem = check_expression(self.positive)
        if problem is not None:
            raise Misdeclared(f"label of {self.event_type}: {problem}")

    @property
    def digest(self) -> str:
        """A short name for the rule, so that versions with the same rule share their labels."""
        text = "\x1f".join((self.event_type, self.request_id, self.positive))
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def label_batch(rule: LabelRule, frame: pl.DataFrame) -> pl.DataFrame:
    """The labels in events of the rule's type, in their order.

    Columns: tenant_id, request_id, positive, and the event's occurred_at.

    An event without a request id labels nothing, and a null `positive` is no label. A request
    that is labelled twice comes out twice. Raises Misdeclared when the rule does not fit the
    event's columns; a value that its expression can't take raises polars' own error.
    """
    if rule.request_id not in frame.columns:
        raise Misdeclared(
            f"label of {rule.event_type}: the event has no column {rule.request_id!r} for the "
            f"request id; it has {sorted(frame.columns)}"
        )
    labels = _evaluated(rule, frame)
    if labels.schema["positive"] != pl.Boolean:
        raise Misdeclared(
            f"label of {rule.event_type}: {rule.positive!r} is a {labels.schema['positive']}; "
            "write a comparison that is true for the positive class"
        )
    return labels.drop_nulls(["request_id", "positive"])


def _evaluated(rule: LabelRule, frame: pl.DataFrame) -> pl.DataFrame:
    columns = [
        pl.col("tenant_id"),
        pl.col(rule.request_id).cast(pl.String).alias("request_id"),
        pl.sql_expr(rule.positive).alias("positive"),
        pl.col("occurred_at"),
    ]
    try:
        return frame.select(columns)
    except PolarsError:
        _check_columns(rule, columns, frame)
        raise


def _check_columns(rule: LabelRule, columns: list[pl.Expr], frame: pl.DataFrame) -> None:
    """Tell a rule that fails without any row, a misfit, from one that fails on some row."""
    try:
        frame.clear().select(columns)
    except PolarsError as error:
        raise Misdeclared(f"label of {rule.event_type}: {rule.positive!r}: {error}") from error
