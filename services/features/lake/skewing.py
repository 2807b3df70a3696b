"""The processor that holds a sample of served vectors to the lake, once it has got so far."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from prometheus_client import Counter

from causemesh.clock import Clock
from causemesh.runner import Batch, Emission, Outgoing
from services.features.domain.snapshots import pack, unpack
from services.features.offline.logged import PREDICTIONS
from services.features.offline.skew import SERVED, Checked, Difference

SKEW = "features.skew.v1"
_KIND, _SEEN = "skew", "seen_us"
_KEPT = pl.Schema([*SERVED.items(), (_SEEN, pl.Int64())])
_INSTANT = pl.Datetime("us", "UTC")


@dataclass(frozen=True)
class SkewLimits:
    """`share` of the requests is sampled, by a hash of the request id; each waits at least `wait_s`
    for the lake, which is looked at every `every_s`, and at most `give_up_s`; no more than `most`
    wait at a time."""

    share: float
    wait_s: float
    every_s: float
    give_up_s: float = 86_400.0
    most: int = 5_000


class SkewMonitor:
    """Compares in the order of positions: an alert's cause is its prediction, and readers take
    causes in order."""

    takes_bad_rows = False
    stateful = True

    def __init__(
        self,
        check: Callable[[pl.DataFrame], Checked],
        partition: int,
        *,
        limits: SkewLimits,
        clock: Clock,
        outcomes: Counter,
    ) -> None:
        self._check = check
        self._partition = partition
        self._limits = limits
        self._clock = clock
        self._outcomes = outcomes
        outcomes.labels(_KIND, "different")  # a rate needs the 0 before the first
        self._kept = _KEPT.to_frame()
        self._next = 0.0

    async def process(
        self, batches: Sequence[Batch], watermark_us: int, transaction: Any
    ) -> Emission:
        """See `Processor.process`; the comparison runs in a thread."""
        for batch in batches:
            self._keep(batch)
        now = self._clock.monotonic()
        due = self._waited(self._limits.wait_s).select(SERVED.names())
        if now < self._next or not due.height:
            return Emission()
        self._next = now + self._limits.every_s
        checked = await asyncio.to_thread(self._check, due)
        self._kept = self._kept.tail(self._kept.height - checked.done)
        differing = len(checked.differences)
        self._count("same", checked.compared - differing)
        self._count("different", differing)
        self._count("not_declared", checked.done - checked.compared)
        # the lake may never get so far: a request of a time that no source promises
        given_up = self._waited(self._limits.give_up_s).height
        self._kept = self._kept.tail(self._kept.height - given_up)
        self._count("not_whole", given_up)
        return Emission([self._alerts(checked.differences)] if differing else ())

    def _waited(self, seconds: float) -> pl.DataFrame:
        """Those that have waited for so long: the first ones."""
        return self._kept.filter(pl.col(_SEEN) <= self._clock.now_us() - round(seconds * 1e6))

    def _keep(self, batch: Batch) -> None:
        """Add the sampled predictions of a batch, as far as there is room."""
        highest = round(self._limits.share * 2**32)
        ids = batch.frame["request_id"].to_list()
        sampled = pl.Series([zlib.crc32(one.encode()) < highest for one in ids], dtype=pl.Boolean)
        mine = batch.frame.select(
            pl.Series("position", batch.positions),
            "request_id",
            "tenant_id",
            pl.col("occurred_at").to_physical().alias("occurred_us"),
            "model",
            "version",
            "vector",
            pl.lit(self._clock.now_us(), pl.Int64).alias(_SEEN),
        ).filter(sampled & (batch.frame["outcome"] == "predicted"))
        room = max(self._limits.most - self._kept.height, 0)
        self._count("no_room", max(mine.height - room, 0))
        self._kept = pl.concat([self._kept, mine.head(room)])

    def _alerts(self, differences: Sequence[Difference]) -> Outgoing:
        rows = [one.row for one in differences]
        frame = pl.DataFrame(
            {
                "tenant_id": [row["tenant_id"] for row in rows],
                "occurred_at": pl.Series([row["occurred_us"] for row in rows]).cast(_INSTANT),
                "request_id": [row["request_id"] for row in rows],
                "model": [row["model"] for row in rows],
                "version": pl.Series([row["version"] for row in rows], dtype=pl.Int32),
                "mode": [row["mode"] for row in rows],
                "features_as_of": pl.Series([row["as_of_us"] for row in rows]).cast(_INSTANT),
                "features": [
                    [
                        {"feature": name, "served": _number(a), "recomputed": _number(b)}
                        for name, (a, b) in one.features.items()
                    ]
                    for one in differences
                ],
            }
        )
        keys: list[bytes | None] = [row["request_id"].encode() for row in rows]
        positions = np.array([row["position"] for row in rows], np.int64)
        return Outgoing(SKEW, frame, keys, PREDICTIONS, self._partition, positions)

    def _count(self, outcome: str, number: int) -> None:
        if number:
            self._outcomes.labels(_KIND, outcome).inc(number)

    def snapshot(self) -> bytes | None:
        """See `Processor.snapshot`: what waits."""
        return pack({"kind": _KIND}, {"kept": self._kept})

    def restore(self, state: bytes | None) -> None:
        """See `Processor.restore`."""
        self._kept = _KEPT.to_frame() if state is None else unpack(state, _KIND)[1]["kept"]


def _number(value: float) -> float | None:
    return None if np.isnan(value) else value
