"""Row-wise SQL expressions over the columns of an event.

An expression must give the same value for an event whatever batch the event comes in. Polars would
evaluate `a - avg(a)` without complaint and the answer would depend on the batch, so only functions
of a single row are let through.
"""

from __future__ import annotations

import re

import polars as pl
from polars.exceptions import PolarsError

# Functions of polars' SQL whose value depends on nothing but their arguments.
ROW_FUNCTIONS = frozenset(
    re.findall(
        r"\w+",
        """
        abs ceil ceiling floor round sign sqrt cbrt power pow exp ln log log2 log10 mod div
        coalesce nullif ifnull if greatest least cast try_cast lower upper length char_length
        starts_with ends_with left right substr strpos replace trim ltrim rtrim concat
        extract date_part sin cos tan asin acos atan atan2 degrees radians pi
        """,
    )
)
_SYNTAX = frozenset(
    ["and", "or", "not", "when", "then", "else", "case", "between", "in", "like", "ilike", "is"]
)
_FORBIDDEN = frozenset(["over", "select", "current_timestamp", "current_date", "current_time"])
_QUOTED = re.compile(r"'(?:[^']|'')*'|\"[^\"]*\"")
_WORD = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)\s*(\(?)")
_TYPE_WITH_LENGTH = frozenset({"decimal", "numeric", "varchar", "char", "float"})


def check_expression(text: str) -> str | None:
    """What is wrong with an expression, for a person to read; None when nothing is."""
    for word, bracket in _WORD.findall(_QUOTED.sub(" quoted ", text)):
        name = word.lower()
        called = bool(bracket) and name not in _SYNTAX | _TYPE_WITH_LENGTH
        if name in _FORBIDDEN or (called and name not in ROW_FUNCTIONS):
            return f"expression {text!r} uses {word!r}, which is no function of a single event"
    try:
        expression = pl.sql_expr(text)
    except PolarsError as error:
        return f"expression {text!r} cannot be read: {error}"
    if not expression.meta.root_names():
        return f"expression {text!r} reads no column of the event"
    return None
