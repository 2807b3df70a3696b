"""From records to hourly usage: columns in, buckets in the unit's transaction out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
from prometheus_client import Counter

from causemesh.bus.base import Positions
from causemesh.catalogue import Catalogue
from causemesh.codec.base import BatchDecoder
from causemesh.errors import Misdeclared, Poison
from causemesh.outbox import Event, add_events
from causemesh.runner import Batch, Emission, Stage
from causemesh.spans import traced_in
from services.billing.domain.members import MEMBER_SCHEMA, meter_members
from services.billing.domain.metering import USAGE_SCHEMA, meter_batch
from services.billing.domain.plans import BillingConfig, Meter
from services.billing.entitlements import entitlement
from services.billing.lateness import Promises, first_open, late_months
from services.billing.store import UsageStore
from services.billing.tracing import keep, traced_usage

GROUP = "billing"
_MONTH = pl.from_epoch("hour_us", time_unit="us").dt.strftime("%Y-%m")
_PERIODS = pl.Schema({"usage_period": pl.String(), "due_period": pl.String()})


def stage_of(catalogue: Catalogue, config: BillingConfig) -> Stage:
    """What billing reads: the topics of all meters. Raises Misdeclared for one it can't bill by."""
    topics = sorted({meter.topic for meter in config.meters.values()})
    for name in topics:
        topic = catalogue.topic(name)
        if topic.form != "fact" or not topic.sources:
            raise Misdeclared(
                f"billing.yaml: {name} can't be metered: months close by watermark and replays are"
                " known by their cause, so a meter's topic must be a fact topic with sources"
            )
        if topic.partitions != catalogue.topic(topics[0]).partitions:
            raise Misdeclared(
                f"{name} has {topic.partitions} partitions and {topics[0]} has"
                f" {catalogue.topic(topics[0]).partitions}; billing reads both by partition number:"
                " give them the same"
            )
    return Stage("billing", GROUP, tuple(topics))


class Metering:
    """The processor of one partition number; its effects are rows in the unit's transaction."""

    takes_bad_rows = False
    stateful = False

    def __init__(
        self,
        stage: Stage,
        partition: int,
        *,
        catalogue: Catalogue,
        decoder: BatchDecoder,
        config: BillingConfig,
        outcomes: Counter,
    ) -> None:
        self._partition = partition
        self._catalogue = catalogue
        self._decoder = decoder
        self._config = config
        self._outcomes = outcomes
        self._expected = {
            (topic, partition): stage.sources(catalogue, (topic, partition))
            for topic in stage.shared
        }
        self._met: set[str] = set()

    async def process(
        self, batches: Sequence[Batch], watermark_us: int, transaction: Any
    ) -> Emission:
        """See `Processor.process`. Raises Poison for records whose usage can't be counted."""
        if batches:
            before = await UsageStore.before(transaction, GROUP, self._partition)
            promises = Promises(self._expected, before.promises)
            welcomes: dict[str, Event] = {}
            for number, batch in enumerate(batches):
                in_force = await promises.in_force(batch, self._catalogue, self._decoder)
                opened = first_open(in_force, self._config.grace_us, before.last_closed)
                due = late_months(batch.occurred_at_us, opened)
                try:
                    usage, members = self._metered(batch, due)
                except Poison as poison:
                    raise Poison(poison.rows, batch=number) from poison
                await UsageStore.add(transaction, usage, members)
                contexts = traced_in(batch)
                if contexts:
                    meters = self._meters(batch)
                    await keep(transaction, traced_usage(batch, contexts, due, meters))
                welcomes = {**self._welcomes(batch, usage), **welcomes}
            await self._meet(transaction, welcomes)
        return Emission()

    def _metered(self, batch: Batch, due: pl.Series) -> tuple[pl.DataFrame, pl.DataFrame]:
        usage = [pl.DataFrame(schema=pl.Schema({**USAGE_SCHEMA, **_PERIODS}))]
        shape = {**MEMBER_SCHEMA, **_PERIODS, "partition": pl.Int32()}
        members = [pl.DataFrame(schema=pl.Schema(shape))]
        for month, rows in _parts(due):
            for meter in self._meters(batch):
                buckets, seen = _part_metered(meter, batch, rows)
                usage.append(_dated(buckets, month))
                kind = "late" if month else "in_time"
                self._outcomes.labels("usage_bucket", kind).inc(buckets.height)
                if seen is not None:
                    at = pl.lit(batch.partition, pl.Int32).alias("partition")
                    members.append(_dated(seen, month).with_columns(at))
        return pl.concat(usage), pl.concat(members)

    def _meters(self, batch: Batch) -> list[Meter]:
        return [one for one in self._config.meters.values() if one.topic == batch.topic]

    def _welcomes(self, batch: Batch, usage: pl.DataFrame) -> dict[str, Event]:
        """What to tell of tenants in `usage`, if they are new."""
        firsts = usage.group_by("tenant_id").agg(pl.col("first").min())
        return {
            tenant: _welcome(batch, tenant, position, self._config.plan_of(tenant).name)
            for tenant, position in firsts.iter_rows()
            if tenant not in self._met
        }

    async def _meet(self, transaction: Any, welcomes: Mapping[str, Event]) -> None:
        """Welcome the tenants of whom usage is seen for the first time.

        All of a unit at once and in order: two workers that meet the same tenants can't deadlock.
        """
        if not welcomes:
            return
        plans = {tenant: event.record["plan"] for tenant, event in welcomes.items()}
        fresh = await UsageStore.meet(transaction, plans)
        events = [welcomes[tenant] for tenant in sorted(fresh)]
        await add_events(transaction, events, shard=self._partition)
        # Only those that were there before: the rows of this unit may still be undone.
        self._met |= welcomes.keys() - fresh

    def snapshot(self) -> bytes | None:
        """No state beside the database."""
        return None

    def restore(self, state: bytes | None) -> None:
        """No state beside the database."""


def _parts(due: pl.Series) -> Iterator[tuple[str | None, Positions]]:
    """Frame rows by the month they are late for; null for those in time."""
    late = due.is_not_null().to_numpy()
    yield None, np.flatnonzero(~late)
    for month in due.drop_nulls().unique().sort():
        yield month, np.flatnonzero((due == month).fill_null(False).to_numpy())


def _part_metered(
    meter: Meter, batch: Batch, rows: Positions
) -> tuple[pl.DataFrame, pl.DataFrame | None]:
    whole = len(rows) == len(batch)
    frame = batch.frame if whole else batch.frame[rows]
    positions = batch.positions if whole else batch.positions[rows]
    try:
        usage = meter_batch(meter, frame, batch.topic, batch.partition, positions)
    except Poison as poison:
        reasons = {int(rows[row]): reason for row, reason in poison.rows.items()}
        raise Poison(reasons) from poison
    return usage, meter_members(meter, frame) if meter.aggregation == "unique" else None


def _dated(found: pl.DataFrame, due: str | None) -> pl.DataFrame:
    return found.with_columns(
        _MONTH.alias("usage_period"), (_MONTH if due is None else pl.lit(due)).alias("due_period")
    )


def _welcome(batch: Batch, tenant: str, position: int, plan: str) -> Event:
    row = int(np.searchsorted(batch.positions, position))
    return entitlement(
        tenant,
        plan,
        occurred_us=int(batch.occurred_at_us[row]),
        origin=(batch.topic, batch.partition, position),
    )
