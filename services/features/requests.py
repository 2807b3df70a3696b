"""Requests as the aligner takes them: resolved to a version, their entities and inputs at hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from causemesh.bus.base import picked
from causemesh.runner import Batch
from services.features.domain.models import UNRESOLVED, ModelBook, named_numbers, named_values
from services.features.domain.vectors import row_bytes

_FEW = 128  # so few rows cost less one by one than column operations do (measured)


def requests_of(batch: Batch, book: ModelBook, entities: Sequence[str]) -> pl.DataFrame:
    """The requests of a batch, with a column for each name in `entities`: what `Aligner` asks for,
    and as payload what a task takes over, the inputs packed in the order of the version."""
    asked = batch.frame
    # Columns, not expressions: a live request comes alone, and pays for each expression.
    frame = pl.DataFrame(
        [
            asked["event_id"].alias("request_id"),
            asked["tenant_id"],
            asked["occurred_at"].cast(pl.Int64).alias("occurred_at_us"),
            asked["model"],
            asked["version"],
            asked["mode"],
            asked["expires_at"].cast(pl.Int64).alias("expires_us"),
            pl.Series("source", np.full(asked.height, batch.partition, dtype=np.int64)),
            pl.Series("position", batch.positions),
            pl.Series("key", picked(batch.raw.keys, batch.rows.tolist()), dtype=pl.Binary),
        ]
    )
    resolved = book.resolve(frame)
    named = named_values(asked["entities"], entities, pl.String)
    packed = packed_inputs(book, resolved["signature"], asked["inputs"])
    kept = [column for column in frame.get_columns() if column.name != "version"]
    more = [*resolved.get_columns(), *named.get_columns(), packed.alias("inputs")]
    return pl.DataFrame([*kept, *more])


def packed_inputs(book: ModelBook, signatures: pl.Series, inputs: pl.Series) -> pl.Series:
    """The inputs of requests (lists of name and value) in the order of each one's version."""
    if len(signatures) <= _FEW:
        asked = zip(signatures.to_list(), inputs.to_list(), strict=True)
        rows = [_packed_row(book, name, row) for name, row in asked]
        return pl.Series("inputs", rows, dtype=pl.Binary)
    packed = np.full(len(signatures), b"", dtype=object)
    for name in sorted(set(signatures.to_list()) - {UNRESOLVED}):
        at = np.flatnonzero((signatures == name).to_numpy())
        mine = inputs if len(at) == len(inputs) else inputs[at]
        packed[at] = row_bytes(named_numbers(mine, book.signatures[name].inputs))
    return pl.Series("inputs", packed.tolist(), dtype=pl.Binary)


def _packed_row(
    book: ModelBook, signature: str, inputs: Sequence[Mapping[str, Any]] | None
) -> bytes:
    if signature == UNRESOLVED:
        return b""
    given = {pair["name"]: pair["value"] for pair in inputs or ()}
    values = [given.get(name) for name in book.signatures[signature].inputs]
    return np.array(values, dtype=np.float64).astype("<f4").tobytes()  # None becomes NaN
