"""On which invoice usage is due, by where its record lies in the log and nothing else.

A month is over for a record once the watermark in force at its position has passed the month's end
and the grace: what the batch or the clock say does not matter, so every run of the same log gives
the same invoices. A worker's committed watermark is never ahead of what is in force at the records
it reads next, so a closed month can't get usage any more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from causemesh.bus.base import TopicPartition
from causemesh.catalogue import WATERMARK, Catalogue
from causemesh.codec.base import BatchDecoder
from causemesh.runner import NEVER, Batch
from causemesh.runner.watermarks import WatermarkTracker

Int64s = npt.NDArray[np.int64]
Months = npt.NDArray[np.datetime64]
_LAST_MONTH = np.datetime64("9999-12", "M")  # later ones would not sort by their text


class Promises:
    """The promises of one partition number of every input, as they stand before a unit."""

    def __init__(
        self,
        expected: dict[TopicPartition, Sequence[TopicPartition]],
        committed: Sequence[Sequence[Any]],
    ) -> None:
        self._tracker = WatermarkTracker(expected)
        self._tracker.load(committed)

    async def in_force(self, batch: Batch, catalogue: Catalogue, decoder: BatchDecoder) -> Int64s:
        """The watermark (microseconds) in force at each row of `batch.frame`."""
        raw = batch.raw
        source = (batch.topic, batch.partition)
        before = self._tracker.of_input(source)
        rising = np.full(len(raw), NEVER if before is None else before, dtype=np.int64)
        # Watermarks are among what the runner left out; the rest of that is of other records.
        left = np.ones(len(raw), dtype=bool)
        left[batch.rows] = False
        others = np.flatnonzero(left)
        left_out = [raw.values[row] for row in others.tolist()]
        if left_out:
            heard = await decoder.decode(left_out, catalogue.controls[WATERMARK])
            origins = zip(heard.frame["source_topic"], heard.frame["source_partition"], strict=True)
            at_us = heard.frame["watermark_at"].to_physical()
            for row, origin, at in zip(others[heard.rows], origins, at_us, strict=True):
                self._tracker.promise(source, origin, at)
                now = self._tracker.of_input(source)
                rising[row] = NEVER if now is None else now
        in_force: Int64s = np.maximum.accumulate(rising)[batch.rows]
        return in_force


def first_open(in_force_us: Int64s, grace_us: int, last_closed: str | None) -> Months:
    """The oldest month whose invoice each row may still be on.

    `last_closed` holds whatever the watermarks say: when the grace was made longer, months are
    closed that would be open by the new one.
    """
    months: Months = (in_force_us - grace_us).astype("datetime64[us]").astype("datetime64[M]")
    if last_closed is not None:
        months = np.maximum(months, np.datetime64(last_closed, "M") + 1)
    return np.minimum(months, _LAST_MONTH)


def late_months(occurred_us: Int64s, opened: Months) -> pl.Series:
    """For each row the month (`2013-01`) it is due in when its own is over, else null."""
    late = occurred_us < opened.astype("datetime64[us]").astype(np.int64)
    due = np.where(late, opened, np.datetime64("NaT"))
    names = [None if np.isnat(month) else str(month) for month in np.unique(due)]
    if names == [None]:
        return pl.repeat(None, len(due), dtype=pl.String, eager=True)
    return pl.Series(np.datetime_as_string(due), dtype=pl.String).replace("NaT", None)
