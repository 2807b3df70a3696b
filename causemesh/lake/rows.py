"""From a batch of a topic to the rows of the lake's tables.

Pure column work: what a table's rows are does not depend on where a batch ends.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
from polars.exceptions import PolarsError

from causemesh.bus.base import RawBatch, picked
from causemesh.catalogue import NO_TENANT, Topic
from causemesh.codec.columns import frame_schema
from causemesh.codec.wire import FOREIGN, schema_ids
from causemesh.errors import Misdeclared
from causemesh.lake.definitions import ENVELOPE, PLACE, TableDefinition

_INSTANT = pl.Datetime("us", "UTC")
FIRST_DAY_US = -62_135_596_800_000_000
"""0001-01-01, the first instant that a date can be written for, in microseconds."""
END_US = 253_402_300_800_000_000
"""10000-01-01: no event may be as late as this, in microseconds."""
_PLACE: dict[str, Any] = {
    "_partition": pl.Int32,
    "_position": pl.Int64,
    "_appended_at": _INSTANT,
}
RAW_COLUMNS = pl.Schema(
    {
        "tenant_id": pl.String,
        "occurred_at": _INSTANT,
        **_PLACE,
        "schema_id": pl.Int64,
        "key": pl.Binary,
        "value": pl.Binary,
        "reason": pl.String,
    }
)
"""The raw zone: the record as it lay in the log, and why it did not decode."""


def place(raw: RawBatch, rows: npt.NDArray[np.int64]) -> pl.DataFrame:
    """Where rows of a raw batch lie in the log."""
    return pl.DataFrame(
        {
            "_partition": np.full(len(rows), raw.partition, dtype=np.int32),
            "_position": raw.positions[rows],
            "_appended_at": raw.appended_at_us[rows],
        },
        schema_overrides={"_appended_at": _INSTANT},
    )


def raw_rows(
    raw: RawBatch, rows: npt.NDArray[np.int64], frame: pl.DataFrame, bad: Mapping[int, str]
) -> pl.DataFrame:
    """Rows of the raw zone: the good ones, `frame[i]` decoded from `raw[rows[i]]`, and the bad.

    A record that does not decode has no tenant and no event time: it lies under the tenant "-" and
    the day on which it was appended; so does, for its day, one whose event time no date can tell.
    """
    numbers = np.concatenate([rows, np.array(sorted(bad), dtype=np.int64)])
    at = place(raw, numbers)
    tenants = [*frame["tenant_id"].to_list(), *[NO_TENANT] * len(bad)]
    occurred = pl.concat(
        [frame["occurred_at"].cast(_INSTANT), pl.Series([None] * len(bad), dtype=_INSTANT)]
    )
    values = picked(raw.values, numbers.tolist())
    ids = schema_ids(values)
    made = at.with_columns(
        pl.Series("tenant_id", tenants, dtype=pl.String),
        pl.when(datable(occurred))
        .then(occurred)
        .otherwise(at["_appended_at"])
        .alias("occurred_at"),
        pl.when(pl.Series(ids != FOREIGN)).then(pl.Series(ids)).otherwise(None).alias("schema_id"),
        pl.Series("key", picked(raw.keys, numbers.tolist()), dtype=pl.Binary),
        pl.Series("value", values, dtype=pl.Binary),
        pl.Series("reason", [bad.get(row) for row in numbers.tolist()], dtype=pl.String),
    )
    return made.select(RAW_COLUMNS.names()).cast(RAW_COLUMNS).sort("_position")


def datable(occurred: pl.Series) -> pl.Series:
    """Which instants lie on a day that a date can be written for; null is none."""
    at_us = occurred.to_physical()
    return ((at_us >= FIRST_DAY_US) & (at_us < END_US)).fill_null(False)


def decoded_rows(raw: RawBatch, rows: npt.NDArray[np.int64], frame: pl.DataFrame) -> pl.DataFrame:
    """Rows of the decoded-structured zone: the record's own columns, then its place."""
    return frame.hstack(place(raw, rows))


def curated_rows(definition: TableDefinition, decoded: pl.DataFrame) -> pl.DataFrame:
    """Rows of a curated table out of decoded-structured ones."""
    each = definition.each
    if definition.where is not None:
        decoded = decoded.filter(pl.sql_expr(definition.where))
    if each is not None:
        decoded = decoded.explode(each, empty_as_null=False, keep_nulls=False)
        items = decoded[each].struct.unnest()
        decoded = decoded.drop(each).hstack([one.alias(f"{each}.{one.name}") for one in items])
    made = [_expression(text, each).alias(name) for name, text in definition.columns.items()]
    return decoded.select(*ENVELOPE, *made, *PLACE)


def _expression(text: str, each: str | None) -> pl.Expr:
    """The expression; `lines.meter` names the column of that name once `lines` is unnested."""
    if each is None:
        return pl.sql_expr(text)
    return pl.sql_expr(_quoted(text, each))


def _quoted(text: str, each: str) -> str:
    words = text.split("'")  # every second part lies inside a string
    outside = [
        _quote_items(part, each) if number % 2 == 0 else part for number, part in enumerate(words)
    ]
    return "'".join(outside)


def _quote_items(part: str, each: str) -> str:
    return re.sub(rf"\b{re.escape(each)}\.([A-Za-z_]\w*)", rf'"{each}.\1"', part)


def table_columns(definition: TableDefinition, topic: Topic) -> pl.Schema:
    """The columns of a table by the catalogue. Raises Misdeclared when an expression is wrong."""
    if definition.zone == "raw":
        return RAW_COLUMNS
    empty = pl.DataFrame(schema={**frame_schema(topic.record), **_PLACE})
    if definition.zone == "decoded":
        return empty.schema
    return check_curated(definition, empty)


def check_curated(definition: TableDefinition, empty: pl.DataFrame) -> pl.Schema:
    """The columns of a curated table. Raises Misdeclared, naming the table."""
    try:
        made = curated_rows(definition, empty).schema
    except (PolarsError, TypeError, AttributeError) as error:
        raise Misdeclared(f"lake.yaml: {definition.identifier}: {error}") from None
    nulls = [name for name, kind in made.items() if kind == pl.Null]
    if nulls:
        raise Misdeclared(f"lake.yaml: {definition.identifier}: {nulls} have no type; cast them")
    return made


def filled(frames: Sequence[pl.DataFrame]) -> pl.DataFrame:
    """Frames as one; a column that an older one lacks is null there."""
    return pl.concat(frames, how="diagonal_relaxed") if len(frames) > 1 else frames[0]
