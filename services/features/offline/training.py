"""Point-in-time training sets: requests with their features as the stream would have had them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from causemesh.errors import Misdeclared
from causemesh.lake.reading import Lake
from services.features.domain.align import DEFAULT_SLICE_US
from services.features.domain.definitions import FeatureView
from services.features.domain.events import Ints, entity_keys
from services.features.domain.transforms import INPUT
from services.features.domain.vectors import Vectors
from services.features.offline.definitions import Definitions
from services.features.offline.engine import answers
from services.features.offline.reading import LakeEvents, Told, Wanted, check_whole
from services.features.offline.sets import TrainingSet, made_now

TIME, AS_OF = "occurred_at", "features_as_of"
_TENANT = "tenant_id"


def training_set(
    requests: pl.DataFrame,
    names: Sequence[str],
    lake: Lake,
    definitions: Definitions,
    *,
    slice_us: int = DEFAULT_SLICE_US,
    incomplete: bool = False,
    told: Told = lambda text: None,
) -> TrainingSet:
    """The requests, as they are, with features_as_of and one float32 column a feature.

    `requests` has occurred_at, the entity columns of the views, tenant_id where a view keeps its
    tenants apart, and `input.x` where an on-demand feature reads it; other columns, such as labels,
    are left alone. `names` are features (view.feature, view@v2.feature) or views: all they have.
    A request sees the events before the start of its slice, as a replayed one does; with `slice_us`
    0 those before its own time. A missing feature is NaN.

    Raises Misdeclared, saying what to change: for unknown names, missing columns or times, for a
    lake that does not hold the events, or not all of them yet unless `incomplete` is fine.
    """
    features = definitions.expand(names)
    as_of = _as_of(requests, slice_us)
    sources = definitions.transforms.sources(features)
    _check_columns(requests, [*features, AS_OF], sources, definitions)
    as_of_us = as_of.to_physical().to_numpy()
    events = LakeEvents(lake, definitions.catalogue, told)
    found = vectors_of(Asking(requests, as_of_us, sources), events, definitions)
    if requests.height and not incomplete:
        check_whole(events.tables, int(as_of_us.max()))
    digest = definitions.transforms.digest(features)
    if digest:
        found = definitions.transforms.compute(features, sources, found)
    columns = [pl.Series(name, found[:, place]) for place, name in enumerate(features)]
    views = {definitions.place(one)[0] for one in sources if not one.startswith(INPUT)}
    about = {
        "kind": "point_in_time",
        "slice_seconds": slice_us / 1e6,
        "features": list(features),
        "views": {one: definitions.view(one).fingerprint for one in sorted(views)},
        "on_demand": digest,
    }
    return made_now(requests.hstack([as_of, *columns]), about, events.tables)


@dataclass(frozen=True)
class Asking:
    """Requests with their as-of times, and the features and inputs (`input.x`) asked for."""

    requests: pl.DataFrame
    as_of_us: Ints
    sources: Sequence[str]

    def keys(self, view: FeatureView) -> pl.Series:
        """The entity of each request in a view, as its key."""
        return entity_keys(self.requests, view, view.request_entity)


def vectors_of(asking: Asking, events: LakeEvents, definitions: Definitions) -> Vectors:
    """What is asked for: float32 [requests, sources]; one view is worked out after the other."""
    count = asking.requests.height
    out = np.full((count, len(asking.sources)), np.nan, np.float32)
    asked: dict[str, list[tuple[int, int]]] = {}
    for column, name in enumerate(asking.sources):
        if name.startswith(INPUT):
            out[:, column] = asking.requests[name].cast(pl.Float64).to_numpy()
        else:
            view_id, place = definitions.place(name)
            asked.setdefault(view_id, []).append((column, place))
    if not count:
        return out
    first_us, last_us = int(asking.as_of_us.min()), int(asking.as_of_us.max())
    views = [definitions.view(name) for name in asked]
    wanted = [
        Wanted(view, asking.keys(view).unique().drop_nulls(), first_us, last_us) for view in views
    ]
    for view, taken in events.read(wanted):
        found = answers(view, taken.events, asking.keys(view), asking.as_of_us, taken.since_us)
        for column, place in asked[view.id]:
            out[:, column] = found[:, place]
        events.told(f"{view.id}: {len(taken):,} events, {count:,} answers")
    return out


def _as_of(requests: pl.DataFrame, slice_us: int) -> pl.Series:
    """The as-of time of each request."""
    if TIME not in requests.columns:
        raise Misdeclared(f"the requests have no column {TIME}: when each of them was asked")
    time = requests[TIME]
    if not isinstance(time.dtype, pl.Datetime | pl.Date):
        raise Misdeclared(f"{TIME} is {time.dtype}; it must be a timestamp (without zone: UTC)")
    if time.null_count():
        raise Misdeclared(f"{TIME} is null in {time.null_count()} requests")
    at_us = time.cast(pl.Datetime("us", getattr(time.dtype, "time_zone", None))).to_physical()
    if slice_us:
        at_us = at_us // slice_us * slice_us
    return at_us.cast(pl.Datetime("us", "UTC")).alias(AS_OF)


def _check_columns(
    requests: pl.DataFrame,
    made: Sequence[str],
    sources: Sequence[str],
    definitions: Definitions,
) -> None:
    """Raises Misdeclared for a column that is to be made and is there, or is needed and is not."""
    taken = [name for name in made if name in requests.columns]
    if taken:
        raise Misdeclared(f"the requests have a column {taken[0]} already; leave it out")
    for name in sources:
        needed, why = [name], "an on-demand feature reads it"
        if not name.startswith(INPUT):
            view = definitions.view(definitions.place(name)[0])
            tenant = [_TENANT] if view.scope == "tenant" else []
            needed, why = [*tenant, *view.request_entity], f"{view.id} is kept by it"
        missing = [column for column in needed if column not in requests.columns]
        if missing:
            raise Misdeclared(
                f"the requests have no column {missing[0]!r} ({why}); they have"
                f" {', '.join(requests.columns)}"
            )
