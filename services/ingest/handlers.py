"""From inbox topics to events, requests and rejects: one batch in, columns out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl
from prometheus_client import Counter

from causemesh.catalogue import NO_TENANT, Catalogue, Progress
from causemesh.client import REQUESTS, request_keys
from causemesh.clock import Clock
from causemesh.runner import NEVER, Batch, Emission, Outgoing
from causemesh.series import kept, null_mask
from services.ingest.domain import (
    REASONS,
    Refused,
    Rules,
    decode_code,
    id_digests,
    refusals,
    reject_columns,
)
from services.ingest.store import IdClaims, IdStore

REJECTS = "ingest.rejects.v1"
ACCEPTED_REQUESTS = "inference.requests.v1"
_QUIET_S = 1.0  # an inbox without records for so long has been read to its end
_PROMISE_STEP_US = 2_000_000  # clock watermarks are no finer: each goes to every partition after it


def target_of(inbox: str) -> str:
    """The topic that accepted records of an inbox topic go to."""
    return ACCEPTED_REQUESTS if inbox == REQUESTS else f"events.{inbox.removeprefix('inbox.')}"


def progress_of(catalogue: Catalogue, inbox: str) -> Progress:
    """Who promises progress on an inbox topic."""
    if inbox == REQUESTS:
        return catalogue.requests
    return catalogue.event_types[inbox.removeprefix("inbox.")].progress


class Door:
    """The processor of one partition number of every inbox topic."""

    takes_bad_rows = True
    stateful = False

    def __init__(
        self,
        catalogue: Catalogue,
        inboxes: Sequence[str],
        *,
        ids: IdStore,
        rules: Rules,
        clock: Clock,
        outcomes: Counter | None = None,
    ) -> None:
        self._catalogue = catalogue
        self._progress = {inbox: progress_of(catalogue, inbox) for inbox in inboxes}
        self._ids = ids
        self._rules = rules
        self._clock = clock
        self._outcomes = outcomes
        self._last_read = dict.fromkeys(inboxes, clock.monotonic())
        self._appended_us: dict[str, int] = {}

    async def process(
        self, batches: Sequence[Batch], watermark_us: int, transaction: Any
    ) -> Emission:
        """Decide every record; see `Processor.process`."""
        reasons = [self._refusals(batch) for batch in batches]
        lost = await self._ids.claim(_claims(batches, reasons))
        outgoing = []
        for batch, reason in zip(batches, reasons, strict=True):
            outgoing += self._outgoing(batch, _with_duplicates(batch, reason, lost))
        return Emission(outgoing, self._promises(batches))

    def _refusals(self, batch: Batch) -> pl.Series:
        appended = batch.raw.appended_at_us[batch.rows]
        now = appended
        if self._progress[batch.topic].watermark == "source" and batch.promised_us is not None:
            now = batch.promised_us[batch.rows]
        return refusals(batch.frame, now, appended, self._rules)

    def _outgoing(self, batch: Batch, reasons: pl.Series) -> list[Outgoing]:
        keep = null_mask(reasons)
        good = kept(batch.frame, keep)
        keys = self._keys(batch.topic, good)
        source = (batch.topic, batch.partition)
        sent = [Outgoing(target_of(batch.topic), good, keys, *source, batch.positions[keep])]
        refused = _refused(batch, reasons)
        if refused.rows:
            raw = batch.raw
            frame = reject_columns(refused, raw.keys, raw.values, raw.appended_at_us)
            tenants: list[bytes | None] = [name.encode() for name in frame["tenant_id"]]
            positions = np.asarray(raw.positions[sorted(refused.rows)], dtype=np.int64)
            sent.append(Outgoing(REJECTS, frame, tenants, *source, positions))
        self._count(batch.topic, len(good), refused)
        return sent

    def _keys(self, inbox: str, frame: pl.DataFrame) -> list[bytes | None]:
        if inbox == REQUESTS:
            keys = request_keys(frame)
        else:
            keys = frame[self._catalogue.topic(inbox).key].cast(pl.String)
        return [None if key is None else key.encode() for key in keys.to_list()]

    def _count(self, inbox: str, accepted: int, refused: Refused) -> None:
        if self._outcomes is None:
            return
        self._outcomes.labels(inbox, "accepted").inc(accepted)
        for code, _ in refused.rows.values():
            self._outcomes.labels(inbox, code).inc()

    def _promises(self, batches: Sequence[Batch]) -> dict[str, int]:
        """The watermarks of inboxes that go by the clock.

        While records arrive, the newest append time is the present: a backlog is not late because
        the door was away. An inbox that is quiet has been read to its end; then it is the clock.
        """
        now = self._clock.monotonic()
        for batch in batches:
            self._last_read[batch.topic] = now
            self._appended_us[batch.topic] = int(batch.raw.appended_at_us[-1])
        promises = {}
        for inbox, progress in self._progress.items():
            if progress.watermark != "clock":
                continue
            quiet = now - self._last_read[inbox] >= _QUIET_S
            present = self._clock.now_us() if quiet else self._appended_us.get(inbox, NEVER)
            if present != NEVER:
                at_us = present - progress.lateness_us
                promises[inbox] = at_us // _PROMISE_STEP_US * _PROMISE_STEP_US
        return promises

    def snapshot(self) -> bytes | None:
        """No state beside the database."""
        return None

    def restore(self, state: bytes | None) -> None:
        """No state beside the database."""


def _claims(batches: Sequence[Batch], reasons: Sequence[pl.Series]) -> IdClaims:
    claims = IdClaims([], [], [], [], [])
    for batch, reason in zip(batches, reasons, strict=True):
        mask = null_mask(reason)
        good = kept(batch.frame, mask)
        claims.digests.extend(id_digests(good))
        claims.topics.extend([batch.topic] * good.height)
        claims.partitions.extend([batch.partition] * good.height)
        claims.positions.extend(batch.positions[mask].tolist())
        claims.occurred_us.extend(batch.occurred_at_us[mask].tolist())
    return claims


def _with_duplicates(
    batch: Batch, reasons: pl.Series, lost: set[tuple[str, int, int]]
) -> pl.Series:
    if not lost:
        return reasons
    duplicate = [
        (batch.topic, batch.partition, position) in lost for position in batch.positions.tolist()
    ]
    codes = [
        "duplicate" if is_duplicate else reason
        for reason, is_duplicate in zip(reasons, duplicate, strict=True)
    ]
    return pl.Series(codes, dtype=pl.String)


def _refused(batch: Batch, reasons: pl.Series) -> Refused:
    rows = {row: (decode_code(detail), detail) for row, detail in batch.bad.items()}
    claimed = {}
    wrong = ~null_mask(reasons)
    if wrong.any():
        frame = kept(batch.frame, wrong)
        numbers = batch.rows[wrong].tolist()
        codes = reasons.drop_nulls().to_list()
        rows |= {n: (code, REASONS[code]) for n, code in zip(numbers, codes, strict=True)}
        names = zip(frame["tenant_id"], frame["event_id"], strict=True)
        claimed = {
            n: (tenant.strip() or NO_TENANT, event_id)
            for n, (tenant, event_id) in zip(numbers, names, strict=True)
        }
    return Refused(rows, claimed)
