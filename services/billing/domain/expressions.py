"""Row-wise SQL expressions: what a meter's filter and value may be.

An event must count the same whatever batch it comes in. Polars would evaluate `x > avg(x)` without
complaint and the bill would depend on the batches, so only functions of a single row pass. Polars'
own `meta.is_row_separable` calls that expression separable, hence a list of our own.
"""

from __future__ import annotations

import re

import polars as pl
from polars.exceptions import PolarsError

_ROW_FUNCTIONS = frozenset(
    re.findall(
        r"\w+",
        """
        abs ceil ceiling floor round sign sqrt power pow exp ln log log2 log10 mod div
        coalesce nullif ifnull if greatest least cast try_cast lower upper length char_length
        starts_with ends_with left right substr strpos replace trim ltrim rtrim concat
        extract date_part
        """,
    )
)
_BEFORE_BRACKETS = frozenset(
    re.findall(r"\w+", "and or not when then else case between in like ilike is decimal varchar")
)
_FORBIDDEN = frozenset(["over", "select", "current_timestamp", "current_date", "current_time"])
_QUOTED = re.compile(r"'(?:[^']|'')*'|\"[^\"]*\"")
_WORD = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)\s*(\(?)")


def problem_with(text: str) -> str | None:
    """What is wrong with an expression, for a person to read; None when nothing is."""
    bare = _QUOTED.sub(" quoted ", text)
    if "--" in bare or "/*" in bare:
        return f"{text!r} holds a comment; leave it out"
    for word, bracket in _WORD.findall(bare):
        name = word.lower()
        called = bool(bracket) and name not in _BEFORE_BRACKETS
        if name in _FORBIDDEN or (called and name not in _ROW_FUNCTIONS):
            return f"{text!r} uses {word!r}, which is no function of a single event; leave it out"
    try:
        expression = pl.sql_expr(text)
    except PolarsError as error:
        hint = "a column named like a word of SQL goes in double quotes"
        return f"{text!r} is no SQL expression: {error} ({hint})"
    if not expression.meta.root_names():
        return f"{text!r} reads no column of the topic; name one"
    return None
