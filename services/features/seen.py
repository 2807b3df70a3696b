"""From when on the stream saw an event, by what it recorded on features.late.v1.

A record there names the view, the entity, the event's time and its inputs. An event is known again
by those: two events that agree in all of them are one as good as the other, so it is moot which of
them a record is of. (The cause would not do: that of a re-keyed view's is a record of the inputs
topic.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl

from services.features.domain.definitions import FeatureView
from services.features.domain.events import Ints, ViewEvents
from services.features.rekeying import unpacked

COLUMNS = ("view", "entity", "columns", "occurred_at", "applied_until", "taken", "cause")
"""What is read of a record."""
_PLACE = ("topic", "partition", "position")


@dataclass(frozen=True)
class LateEvents:
    """Events that came late for a view: up to when events had been applied, and whether it still
    took them."""

    events: ViewEvents
    applied_until_us: Ints
    taken: pl.Series


@dataclass(frozen=True)
class Seen:
    """Events that a view took; each counts for as-of times after its `since_us`.

    That is its own time, but for one that came when later events had been applied: up to when.
    """

    events: ViewEvents
    since_us: Ints

    def __len__(self) -> int:
        return len(self.events)


def late_events(view: FeatureView, records: pl.DataFrame) -> LateEvents:
    """What came late for a view, from records for any views, each cause once."""
    causes = pl.col("cause").struct
    mine = (
        records.filter(pl.col("view") == view.id)
        .with_columns(causes.field(name).alias(f"cause.{name}") for name in _PLACE)
        .unique([f"cause.{name}" for name in _PLACE], keep="first", maintain_order=True)
    )
    events = unpacked(view, mine, 0) if mine.height else ViewEvents.none(view)
    return LateEvents(events, mine["applied_until"].to_physical().to_numpy(), mine["taken"])


def seen(view: FeatureView, events: ViewEvents, late: LateEvents) -> Seen:
    """Of all events those that the view took, and since when it had each."""
    since_us = events.occurred_at_us
    if not len(late.events):
        return Seen(events, since_us)
    keys = ["entity", "at", *(f"value{place}" for place in range(len(view.columns)))]
    nth = pl.int_range(pl.len()).over(keys).alias("nth")
    told = _table(late.events).with_columns(
        nth, pl.Series("until", late.applied_until_us), late.taken.alias("taken")
    )
    alike = _table(events).with_row_index("row").join(told.select(keys).unique(), on=keys)
    found = alike.sort("row").with_columns(nth).join(told, on=[*keys, "nth"])
    rows, taken = found["row"].cast(pl.Int64).to_numpy(), found["taken"].to_numpy()
    since_us = since_us.copy()
    since_us[rows] = np.maximum(since_us[rows], found["until"].to_numpy())
    kept = np.delete(np.arange(len(events)), rows[~taken])
    return Seen(events.take(kept), since_us[kept])


def _table(events: ViewEvents) -> pl.DataFrame:
    values = {f"value{place}": column for place, column in enumerate(events.values)}
    return pl.DataFrame({"entity": events.entity, "at": events.occurred_at_us, **values})
