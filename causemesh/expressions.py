"""Row-wise SQL expressions over one record: what filters, values, inputs and labels may be.

An expression must give the same value for a record whatever batch it comes in. Polars would
evaluate `a - avg(a)` without complaint, and the answer would depend on the batch; its own
`meta.is_row_separable` calls that separable. So only functions of a single row are let through.
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
_BEFORE_BRACKETS = frozenset(
    re.findall(
        r"\w+",
        """
        and or not when then else case between in like ilike is
        decimal numeric varchar char float
        """,
    )
)
_FORBIDDEN = frozenset(["over", "select", "current_timestamp", "current_date", "current_time"])
_QUOTED = re.compile(r"'(?:[^']|'')*'|\"[^\"]*\"")
# A comment or a backtick between a name and its bracket would hide a call.
_COMMENT_OR_BACKTICK = re.compile(r"/\*|--|`")
_WORD = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)\s*(\(?)")


def check_expression(text: str) -> str | None:
    """What is wrong with an expression, for a person to read; None when nothing is."""
    bare = _QUOTED.sub(" quoted ", text)
    if _COMMENT_OR_BACKTICK.search(bare):
        return f"{text!r} holds a comment or a backtick; write it without"
    for word, bracket in _WORD.findall(bare):
        name = word.lower()
        called = bool(bracket) and name not in _BEFORE_BRACKETS
        if name in _FORBIDDEN or (called and name not in ROW_FUNCTIONS):
            return f"{text!r} uses {word!r}, which is no function of a single event; leave it out"
    try:
        expression = pl.sql_expr(text)
    except PolarsError as error:
        hint = "a column named like a word of SQL goes in double quotes"
        return f"{text!r} is no SQL expression: {error} ({hint})"
    if not expression.meta.root_names():
        return f"{text!r} reads no column of the event; name one"
    return None
