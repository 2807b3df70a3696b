"""Events that came too late for a view: counted, and sent to features.late.v1 with their values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from causemesh.runner import Batch, Outgoing
from services.features.domain.definitions import FeatureView
from services.features.domain.events import Ints, ViewEvents
from services.features.rekeying import packed_columns

LATE = "features.late.v1"


@dataclass(frozen=True)
class Missed:
    """Events that a view did not take; number: the view's place among all; positions: of the
    records of the batch that they came in."""

    view: FeatureView
    number: int
    events: ViewEvents
    positions: Ints


def missed_records(batch: Batch, missed: Sequence[Missed], applied_until_us: int) -> Outgoing:
    """One record for each event and view that missed it, in the order of their causes."""
    parts = [
        pl.DataFrame(
            {
                "view": pl.repeat(one.view.id, len(one.events), dtype=pl.String, eager=True),
                "entity": one.events.entity,
                "columns": pl.Series(packed_columns(one.events), dtype=pl.Binary),
                "occurred_at": pl.Series(one.events.occurred_at_us).cast(pl.Datetime("us", "UTC")),
                "position": one.positions,
                "index": pl.repeat(one.number, len(one.events), dtype=pl.Int32, eager=True),
            }
        )
        for one in missed
    ]
    frame = pl.concat(parts).sort("position", "index")
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
        frame["index"].to_numpy().astype(np.int32),
    )
