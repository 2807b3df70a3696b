"""Which traces are behind an invoice: contexts of traced usage, kept until its month closes.

Nothing is written for usage that nobody traces. At most 32 contexts lead to one invoice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from causemesh.runner import Batch
from causemesh.spans import LINKS
from causemesh.spans_sending import Trace
from services.billing.domain.plans import Meter
from services.billing.domain.rows import matching_rows
from services.billing.tables import usage_traces

_MONTH = pl.from_epoch("hour_us", time_unit="us").dt.strftime("%Y-%m")
# The bound is on what is kept, too: a tenant that traces everything fills no table.
_ADD = sa.text(
    """
    INSERT INTO usage_traces (due_period, tenant_id, meter, usage_period, traceparent)
    SELECT * FROM unnest(
        CAST(:due_period AS text[]), CAST(:tenant_id AS text[]), CAST(:meter AS text[]),
        CAST(:usage_period AS text[]), CAST(:traceparent AS text[])
    ) AS fresh (due_period, tenant_id, meter, usage_period, traceparent)
    WHERE :links > (
        SELECT count(*) FROM usage_traces AS known
        WHERE known.due_period = fresh.due_period AND known.tenant_id = fresh.tenant_id
    )
    ON CONFLICT DO NOTHING
    """
)
_OF_MONTH = sa.text(
    """
    SELECT tenant_id, meter, usage_period, traceparent FROM (
        SELECT *, row_number() OVER (
            PARTITION BY tenant_id ORDER BY meter, usage_period, traceparent
        ) AS number
        FROM usage_traces WHERE due_period = :period
    ) AS numbered
    WHERE number <= :links ORDER BY tenant_id, number
    """
)


def traced_usage(
    batch: Batch, contexts: Mapping[int, bytes], due: pl.Series, meters: Sequence[Meter]
) -> list[dict[str, str]]:
    """Rows of `usage_traces` for those traced records of a batch that a meter counts.

    `contexts` are by position; `due` is each frame row's month where it is late, else null.
    """
    rows = np.searchsorted(batch.positions, list(contexts))
    frame, late = batch.frame[rows], due.gather(rows)
    positions = pl.Series(list(contexts), dtype=pl.Int64)
    months = dict(zip(contexts, late, strict=True))
    found: list[dict[str, str]] = []
    counts: Counter[tuple[str, str]] = Counter()
    for meter in meters:
        counted = matching_rows(meter, frame, positions).with_columns(_MONTH.alias("month"))
        for tenant, month, position in counted.select("tenant_id", "month", "position").iter_rows():
            due_period = months[position] or month
            counts[tenant, due_period] += 1
            if counts[tenant, due_period] <= LINKS:
                found.append(
                    {
                        "due_period": due_period,
                        "tenant_id": tenant,
                        "meter": meter.name,
                        "usage_period": month,
                        "traceparent": contexts[position].decode("ascii", "replace"),
                    }
                )
    return found


async def keep(transaction: AsyncConnection, traced: Sequence[Mapping[str, str]]) -> None:
    """Keep contexts until their month closes."""
    if traced:
        columns = {name: [row[name] for row in traced] for name in traced[0]}
        await transaction.execute(_ADD, {**columns, "links": LINKS})


async def taken_for(transaction: AsyncConnection, period: str) -> dict[str, list[Trace]]:
    """The traces behind each tenant's invoice of `period`, at most 32; they are let go of."""
    values: dict[str, Any] = {"period": period, "links": LINKS}
    found: dict[str, list[Trace]] = {}
    for tenant, meter, month, context in await transaction.execute(_OF_MONTH, values):
        about = {"causemesh.meter": meter, "causemesh.usage_period": month}
        found.setdefault(tenant, []).append((context.encode(), about))
    if found:
        await transaction.execute(
            sa.delete(usage_traces).where(usage_traces.c.due_period == period)
        )
    return found
