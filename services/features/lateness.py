"""Events that came late for a view: sent to features.late.v1 with their values and what came of it.

Each event and view is told by one partition, the one that is named by the event's own: a broadcast
view is held by all of them, and readers take the causes of a partition in their order, so the
records of several, each with a watermark of its own, would push each other out as replays. Each
partition judges for itself; the one that tells may be another than the one that answered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from causemesh.runner import Batch, Outgoing
from services.features.domain.definitions import FeatureView
from services.features.domain.events import Ints, ViewEvents
from services.features.domain.late import Behind
from services.features.rekeying import packed_columns, view_index

LATE = "features.late.v1"


@dataclass(frozen=True)
class Late:
    """Events of a view that came behind what it had applied, all or some of a batch.

    events: those that were given to the view; positions: of the records that they came in; behind:
    which of them came late.
    """

    view: FeatureView
    events: ViewEvents
    positions: Ints
    behind: Behind


def tells(partition: int, batch: Batch, partitions: int) -> bool:
    """Whether, of `partitions`, this is the one that tells of a batch's late events."""
    return batch.partition % partitions == partition


def late_records(batch: Batch, late: Sequence[Late], applied_until_us: int) -> Outgoing:
    """One record for each event and view that it was late for, in the order of their causes."""
    frame = pl.concat([_columns(one) for one in late]).sort("position", "index")
    tenants = pl.DataFrame({"position": batch.positions, "tenant_id": batch.frame["tenant_id"]})
    frame = frame.join(tenants, on="position", how="left", maintain_order="left")
    until = pl.repeat(applied_until_us, frame.height, dtype=pl.Int64, eager=True)
    return Outgoing(
        LATE,
        frame.drop("position", "index").with_columns(
            until.cast(pl.Datetime("us", "UTC")).alias("applied_until")
        ),
        [entity.encode() for entity in frame["entity"].to_list()],
        batch.topic,
        batch.partition,
        frame["position"].to_numpy(),
        frame["index"].to_numpy(),
    )


def _columns(one: Late) -> pl.DataFrame:
    rows = one.behind.rows
    events = one.events.take(rows)
    # the view by its checksum, as on the inputs topic: another view changes no index
    index = np.full(len(rows), view_index(one.view), np.int32)
    return pl.DataFrame(
        {
            "view": pl.repeat(one.view.id, len(rows), dtype=pl.String, eager=True),
            "entity": events.entity,
            "columns": pl.Series(packed_columns(events), dtype=pl.Binary),
            "occurred_at": pl.Series(events.occurred_at_us).cast(pl.Datetime("us", "UTC")),
            "taken": one.behind.taken,
            "position": one.positions[rows],
            "index": index,
        }
    )
