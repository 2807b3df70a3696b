"""Which events the stream did not see, by what it recorded on features.late.v1.

A record there names the view, the entity, the event's time and its inputs. An event is known again
by those: two events that agree in all of them are one as good as the other, so it is moot which of
them is left out. (The cause would not do: that of a re-keyed view's is a record of the inputs
topic.)
"""

from __future__ import annotations

import polars as pl

from services.features.domain.definitions import FeatureView
from services.features.domain.events import ViewEvents
from services.features.rekeying import unpacked

COLUMNS = ("view", "entity", "columns", "occurred_at", "cause")
"""What is read of a record."""
_PLACE = ("topic", "partition", "position")


def missed_events(view: FeatureView, records: pl.DataFrame) -> ViewEvents:
    """The events that a view did not take, from records of any views, each cause once."""
    causes = pl.col("cause").struct
    mine = (
        records.filter(pl.col("view") == view.id)
        .with_columns(causes.field(name).alias(f"cause.{name}") for name in _PLACE)
        .unique([f"cause.{name}" for name in _PLACE], maintain_order=True)
    )
    return unpacked(view, mine, 0) if mine.height else ViewEvents.none(view)


def without(view: FeatureView, events: ViewEvents, missed: ViewEvents) -> ViewEvents:
    """The events less those that were missed."""
    if not len(missed):
        return events
    keys = ["entity", "at", *(f"value{place}" for place in range(len(view.columns)))]
    gone = _table(missed).group_by(keys).agg(pl.len().cast(pl.Int64).alias("gone"))
    table = _table(events).with_row_index("row")
    number = pl.int_range(pl.len()).over(keys)
    rows = table.join(gone, on=keys).filter(number < pl.col("gone")).select("row")
    kept = table.join(rows, on="row", how="anti", maintain_order="left")
    return events.take(kept["row"].cast(pl.Int64).to_numpy())


def _table(events: ViewEvents) -> pl.DataFrame:
    values = {f"value{place}": column for place, column in enumerate(events.values)}
    return pl.DataFrame({"entity": events.entity, "at": events.occurred_at_us, **values})
