"""Proves invoices from the log: the same records are read, counted and rated once more.

Months are proved on the terms they were closed with. Hourly buckets play no part: only the position
ranges are taken from what was stored.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import polars as pl

from causemesh.bus.base import TopicPartition
from causemesh.errors import Fatal, Gone
from causemesh.log import LogReader, Span
from causemesh.runner import Batch
from services.billing.books import Books, Head
from services.billing.domain.invoicing import Billed, InvoiceLine, close_month
from services.billing.domain.members import MEMBER_SCHEMA, merge_members, meter_members
from services.billing.domain.metering import USAGE_SCHEMA, merge_usage, meter_batch
from services.billing.domain.plans import BASE_FEE, BillingConfig, Meter
from services.billing.domain.rating import base_fee, rate_difference
from services.billing.domain.usage import PositionRange, UsageRow, monthly_usage

_RANGE = pl.Schema(
    {
        "tenant_id": pl.String(),
        "usage_period": pl.String(),
        "topic": pl.String(),
        "partition": pl.Int32(),
        "first": pl.Int64(),
        "last": pl.Int64(),
    }
)


@dataclass(frozen=True)
class Proof:
    """A line as it is on the invoice, and as the log gives it; `records` is how many it counts."""

    equal: bool
    quantity_micro: int
    amount_minor: int
    recomputed_quantity_micro: int
    recomputed_amount_minor: int
    records: int


@dataclass(frozen=True)
class Recount:
    """Whether all invoices of a month come out of the log again; `differing` are those that
    don't."""

    equal: bool
    invoices: int
    differing: tuple[str, ...]


@dataclass(frozen=True)
class _Counted:
    usage: Mapping[str, list[UsageRow]]
    records: int


class Proofs:
    """Reads the log back and compares."""

    def __init__(self, books: Books, log: LogReader) -> None:
        self._books = books
        self._log = log

    async def line(self, head: Head, line: InvoiceLine) -> Proof:
        """Prove one line. Raises Retryable; Gone when the log no longer holds its records."""
        config = await self._config(head)
        if line.meter == BASE_FEE:
            fees = base_fee(config, config.plan_of(head.tenant_id))
            rated = {fee.tier: (fee.quantity_micro, fee.amount_minor) for fee in fees}
            records = 0
        else:
            used = UsageRow(line.meter, line.usage_period, 0, line.ranges)
            counted = await self._counted(config, {head.tenant_id: [used]})
            before = await self._books.billed_of(head.period, [head.tenant_id])
            rated = _rated(config, head.tenant_id, line, counted, before.get(head.tenant_id, []))
            records = counted.records
        quantity, amount = rated.get(line.tier, (0, 0))
        stored = (line.quantity_micro, line.amount_minor)
        return Proof((quantity, amount) == stored, *stored, quantity, amount, records)

    async def month(self, period: str) -> Recount | None:
        """Close a month once more, from the log, and compare; None while it is open.

        Raises Retryable; Gone when the log no longer holds its records.
        """
        terms = await self._books.terms_of(period)
        if terms is None:
            return None
        config = terms.config
        closed = await self._books.usage_of(period)
        counted = await self._counted(config, closed)
        heads = {head.tenant_id: head for head in await self._books.of_month(period)}
        lines = await self._books.lines_of(head.invoice_id for head in heads.values())
        tenants = sorted({*closed, *heads})
        before = await self._books.billed_of(period, tenants)
        differing = []
        for tenant in tenants:
            usage = counted.usage.get(tenant, [])
            again = close_month(config, tenant, period, usage, before.get(tenant, []))
            head = heads.get(tenant)
            stored = () if head is None else tuple(lines.get(head.invoice_id, ()))
            total = 0 if head is None else head.total_minor
            same_usage = _plain(usage) == _plain(closed.get(tenant, []))
            same_lines = _by_id(again.lines) == _by_id(stored) and again.total_minor == total
            if not (same_lines and same_usage):
                differing.append(again.invoice_id)
        return Recount(not differing, len(heads), tuple(differing))

    async def meter_of(self, head: Head, line: InvoiceLine) -> Meter | None:
        """The meter of a line, as it was when the month was closed; None for a base fee."""
        return (await self._config(head)).meters.get(line.meter)

    async def _config(self, head: Head) -> BillingConfig:
        terms = await self._books.terms_of(head.period)
        if terms is None:
            raise Fatal(f"{head.period} has invoices but is not closed: the database was altered")
        return terms.config

    async def _counted(
        self, config: BillingConfig, closed: Mapping[str, Sequence[UsageRow]]
    ) -> _Counted:
        """The usage that the log gives for the ranges in `closed`, in one pass over them.

        Records sent again are known by their cause (`LogReader`) and, apart from that, their id.
        """
        meters = {name: _ranges(name, closed) for name in config.meters}
        kept: dict[tuple[str, TopicPartition], list[pl.DataFrame]] = defaultdict(list)
        spans = _spans(closed)
        async for batch in self._log.read(spans):
            _check_begin(batch, spans)
            for meter in _of_topic(config, batch.topic):
                inside = _inside(batch, meter, meters[meter.name])
                if inside.height:
                    kept[meter.name, (batch.topic, batch.partition)].append(inside)
        usage, members = USAGE_SCHEMA.to_frame(), MEMBER_SCHEMA.to_frame()
        records = 0
        for (name, (topic, partition)), frames in kept.items():
            meter = config.meters[name]
            once = pl.concat(frames).unique("event_id", keep="first", maintain_order=True)
            positions = once["__position"].to_numpy()
            found = meter_batch(meter, once, topic, partition, positions)
            usage = merge_usage(usage, found)
            records += _matching(meter, once)
            if meter.aggregation == "unique":
                members = merge_members(members, meter_members(meter, once))
        return _Counted(monthly_usage(usage, members), records)


def _rated(
    config: BillingConfig,
    tenant: str,
    line: InvoiceLine,
    counted: _Counted,
    before: Sequence[Billed],
) -> dict[int, tuple[int, int]]:
    """Quantity and amount by tier: what the counted usage adds to what was billed before."""
    now = sum(row.quantity_micro for row in counted.usage.get(tenant, []))
    at = (line.meter, line.usage_period)
    billed = sum(one.quantity_micro for one in before if (one.meter, one.usage_period) == at)
    plan = config.plan_of(tenant)
    rated = rate_difference(config, plan, {line.meter: now}, {line.meter: billed})
    return {one.tier: (one.quantity_micro, one.amount_minor) for one in rated}


def _by_id(lines: Iterable[InvoiceLine]) -> dict[str, InvoiceLine]:
    return {line.line_id: line for line in lines}


def _plain(rows: Iterable[UsageRow]) -> set[tuple[str, str, int]]:
    return {(row.meter, row.usage_period, row.quantity_micro) for row in rows}


def _of_topic(config: BillingConfig, topic: str) -> list[Meter]:
    return [meter for meter in config.meters.values() if meter.topic == topic]


def _all_ranges(
    closed: Mapping[str, Sequence[UsageRow]],
) -> Iterable[tuple[str, UsageRow, PositionRange]]:
    for tenant, rows in closed.items():
        for row in rows:
            for span in row.ranges:
                yield tenant, row, span


def _ranges(meter: str, closed: Mapping[str, Sequence[UsageRow]]) -> pl.DataFrame:
    rows = [
        (tenant, row.usage_period, span.topic, span.partition, span.first, span.last)
        for tenant, row, span in _all_ranges(closed)
        if row.meter == meter
    ]
    return pl.DataFrame(rows, schema=_RANGE, orient="row")


def _spans(closed: Mapping[str, Sequence[UsageRow]]) -> dict[TopicPartition, Span]:
    """One span a partition that holds all of its ranges."""
    spans: dict[TopicPartition, Span] = {}
    for _, _, at in _all_ranges(closed):
        known = spans.get((at.topic, at.partition), Span(at.first - 1, at.last))
        spans[at.topic, at.partition] = Span(
            min(known.after, at.first - 1), max(known.last, at.last)
        )
    return spans


def _check_begin(batch: Batch, spans: dict[TopicPartition, Span]) -> None:
    """Raises Gone unless a partition's first batch has the record that its span begins with."""
    source = (batch.topic, batch.partition)
    span = spans.pop(source, None)
    if span is not None and len(batch) and int(batch.positions[0]) > span.after + 1:
        raise Gone(
            f"the log of {batch.topic}-{batch.partition} begins at {int(batch.positions[0])},"
            f" but records from {span.after + 1} on were billed: retention took them"
        )


def _inside(batch: Batch, meter: Meter, ranges: pl.DataFrame) -> pl.DataFrame:
    """The batch's rows that lie in a range of their tenant and month.

    The columns are those that the meter needs, event_id and `__position`.
    """
    here = ranges.filter(topic=batch.topic, partition=batch.partition)
    known = here.select("tenant_id", "usage_period", __first="first", __last="last")
    rows = batch.frame.select(
        *_columns(meter),
        pl.Series("__position", batch.positions, dtype=pl.Int64),
        pl.col("occurred_at").dt.strftime("%Y-%m").alias("__month"),
    )
    inside = pl.col("__position").is_between("__first", "__last")
    joined = rows.join(
        known,
        left_on=["tenant_id", "__month"],
        right_on=["tenant_id", "usage_period"],
        maintain_order="left",
    )
    return joined.filter(inside)


def _columns(meter: Meter) -> list[str]:
    """What a month's records are kept of: a vector weighs more than all the rest."""
    texts = [text for text in (meter.filter, meter.value) if text is not None]
    roots = {name for text in texts for name in pl.sql_expr(text).meta.root_names()}
    return sorted({"event_id", "tenant_id", "occurred_at", *roots})


def _matching(meter: Meter, frame: pl.DataFrame) -> int:
    return frame.height if meter.filter is None else frame.filter(pl.sql_expr(meter.filter)).height
