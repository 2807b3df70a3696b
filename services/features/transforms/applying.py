"""Events through a user's function, one after another: what they make and how tables change."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from causemesh.derived import Transform
from causemesh.runner.emitter import event_ids
from services.features.transforms.encoding import ENVELOPE
from services.features.transforms.loading import Event, Function
from services.features.transforms.rows import Mark, Row, Source, Table, row_key, stored_form

MAX_OUTPUTS = 1_000
MAX_OUTPUT_BYTES = 1_048_576
_SHOWN = 500
Encode = Callable[[Mapping[str, Any]], bytes]
"""A whole record of the output, framed. Raises ValueError for one that does not fit."""


@dataclass(frozen=True)
class Given:
    """An event at its position on the transform's feed; `source` and `mark` are its own cause."""

    position: int
    key: bytes
    source: Source
    mark: Mark
    event: Event


@dataclass
class Applied:
    """What a batch led to. `values` and `keys` are the output's records in cause order; `rows` the
    tables that changed, `failed` the events (by place) whose function failed, and why."""

    keys: list[bytes | None] = field(default_factory=list)
    values: list[bytes] = field(default_factory=list)
    rows: dict[bytes, Row] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    replays: int = 0


class Applier:
    """One transform's function on the events of one partition of its feed."""

    def __init__(
        self, transform: Transform, function: Function, encode: Encode, timeout_s: float
    ) -> None:
        self._transform = transform
        self._function = function
        self._encode = encode
        self._timeout_s = timeout_s

    async def apply(
        self, partition: int, events: Sequence[Given], held: Callable[[bytes], Row | None]
    ) -> Applied:
        """Apply events in order; `held` gives the row that is stored under a key.

        A failure leaves its event's table as it was and makes nothing; the next event goes on. It
        counts as applied all the same: a replay of it would fail once more.
        """
        done = Applied()
        for place, given in enumerate(events):
            name = self._row_of(given)
            row = done.rows.get(name) or held(name) or Row()
            if row.seen(given.source, given.mark):
                done.replays += 1
                continue
            value = row.value
            try:
                made, value = await self._one(partition, given, row.table())
            except Exception as error:  # noqa: BLE001 - it becomes the reason on the dead letter
                done.failed[place] = f"{type(error).__name__}: {error}"[:_SHOWN]
            else:
                done.keys += [key for key, _ in made]
                done.values += [record for _, record in made]
            done.rows[name] = row.after(given.position, given.source, given.mark, value)
        return done

    async def _one(
        self, partition: int, given: Given, table: Table
    ) -> tuple[list[tuple[bytes | None, bytes]], str | None]:
        """The keys and records that an event makes, and the table after it."""
        yielded: list[dict[str, Any]] = []
        call = self._function(given.event, table)
        async with asyncio.timeout(self._timeout_s), aclosing(call) as made_by_it:
            async for one in made_by_it:
                yielded.append(dict(one))
                if len(yielded) > MAX_OUTPUTS:
                    raise ValueError(f"an event makes more than {MAX_OUTPUTS} events")
        made = [
            self._record(partition, given, index, fields) for index, fields in enumerate(yielded)
        ]
        return made, stored_form(table)

    def _record(
        self, partition: int, given: Given, index: int, fields: dict[str, Any]
    ) -> tuple[bytes | None, bytes]:
        ours = sorted(ENVELOPE & set(fields))
        if ours:
            raise ValueError(f"{ours} are set by the mesh")
        feed = self._transform.feed
        (event_id,) = event_ids(self._transform.output, feed, partition, [given.position], [index])
        cause = {"topic": feed, "partition": partition, "position": given.position, "index": index}
        record = self._encode(
            {
                **fields,
                "event_id": event_id,
                "tenant_id": given.event["tenant_id"],
                "occurred_at": given.event.occurred_at,
                "cause": {**cause, "origin": None},
            }
        )
        if len(record) > MAX_OUTPUT_BYTES:
            raise ValueError(f"an event of {len(record)} bytes, more than {MAX_OUTPUT_BYTES}")
        key = fields.get(self._transform.key)
        return (None if key is None else str(key).encode()), record

    def _row_of(self, given: Given) -> bytes:
        tenant = None if self._transform.scope == "shared" else str(given.event["tenant_id"])
        return row_key(tenant, given.key)
