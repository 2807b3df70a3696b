"""Labels from later events: what really happened to a request."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

import polars as pl
from polars.exceptions import PolarsError

from causemesh.errors import Misdeclared

# A label must not depend on the batch that its event came in, and polars evaluates aggregates and
# windows in any expression; so what may be called is listed.
_CALLABLE = frozenset(
    re.findall(
        r"\w+",
        """
        and or not when then else case between in is like ilike
        abs ceil floor round coalesce nullif cast try_cast lower upper length trim
        starts_with ends_with
        """,
    )
)
_FORBIDDEN = frozenset(["select", "current_date", "current_time", "current_timestamp"])
_QUOTED = re.compile(r"'(?:[^']|'')*'|\"[^\"]*\"")
_COMMENT_OR_BACKTICK = re.compile(r"/\*|--|`")
_WORD = re.compile(r"([A-Za-z_]\w*)\s*(\(?)")


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
        problem = _problem(self.positive)
        if problem:
            raise Misdeclared(f"label of {self.event_type}: {self.positive!r} {problem}")

    @property
    def digest(self) -> str:
        """A short name for the rule, so that versions with the same rule share their labels."""
        text = "\x1f".join((self.event_type, self.request_id, self.positive))
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _problem(text: str) -> str | None:
    bare = _QUOTED.sub(" quoted ", text)
    if _COMMENT_OR_BACKTICK.search(bare):
        return "holds a comment or a backtick: write it without"
    for word, bracket in _WORD.findall(bare):
        name = word.lower()
        if name in _FORBIDDEN or (bracket and name not in _CALLABLE):
            return f"uses {word!r}, which is no function of a single event"
    try:
        columns = pl.sql_expr(text).meta.root_names()
    except PolarsError as error:
        return f"is no SQL expression: {error}"
    return None if columns else "reads no column of the event"


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
