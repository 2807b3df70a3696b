"""The first stage: events of a transform's inputs, keyed by the field that its tables go by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl

from causemesh.derived import Transform
from causemesh.runner import Batch, Emission, Outgoing


class Feed:
    """Passes events on, byte for byte, to the feeds of the transforms that read them.

    An event whose field is null has no table to go to, and is left out.
    """

    takes_bad_rows = False
    stateful = False

    def __init__(self, transforms: Sequence[Transform]) -> None:
        self._transforms = transforms

    async def process(
        self, batches: Sequence[Batch], watermark_us: int, transaction: Any
    ) -> Emission:
        """See `Processor.process`."""
        return Emission(
            [
                _fed(transform, batch)
                for batch in batches
                for transform in self._transforms
                if batch.topic in transform.sources
            ]
        )

    def snapshot(self) -> bytes | None:
        """No state."""
        return None

    def restore(self, state: bytes | None) -> None:
        """No state."""


def _fed(transform: Transform, batch: Batch) -> Outgoing:
    keys = batch.frame[transform.by].cast(pl.String)
    kept = np.flatnonzero(keys.is_not_null().to_numpy())
    raw_rows = batch.rows[kept].tolist()
    event_type = batch.topic.removeprefix("events.")
    frame = pl.DataFrame(
        {
            "tenant_id": batch.frame["tenant_id"].gather(kept),
            "occurred_at": batch.frame["occurred_at"].gather(kept),
            "event_type": pl.Series([event_type] * len(kept), dtype=pl.String),
            "value": pl.Series([batch.raw.values[row] for row in raw_rows], dtype=pl.Binary),
        }
    )
    message_keys: list[bytes | None] = [key.encode() for key in keys.gather(kept).to_list()]
    return Outgoing(
        transform.feed,
        frame,
        message_keys,
        batch.topic,
        batch.partition,
        np.asarray(batch.positions[kept]),
    )
