"""Feature views as YAML, short enough to be written by hand.

```yaml
views:
  origin_departures:               # or origin_departures@v2, beside the first version
    event: flights.departed
    entity: origin                 # or [origin, carrier], or {origin: dest}: request's: event's
    scope: shared                  # tenant (default): every tenant has its own state
    placement: partitioned         # (default), rekeyed, broadcast
    filter: cancelled = 0          # SQL over one event; events that do not match are not seen
    columns:                       # only for inputs that are not a column of that name already
      delay: dep_delay
      late: dep_delay >= 15
    windows: [1h, 3h]              # what an aggregation runs over unless it names its own
    features:
      "*": [count]                 # count_1h, count_3h; also [age]
      delay: [mean, std, max 3h]   # delay_mean_1h, delay_mean_3h, delay_std_1h, ..., delay_max_3h
      late: [mean 3h, sum 1h/1d]   # late_mean_3h, late_sum_1h_per_1d: one divided by the other
      gate: [distinct 1d, share3 1d, top1 1h]  # how many, what part the top 3 are, the commonest
      fare: [p50 1d, p99.9 1d]     # fare_p50_1d, fare_p99_9_1d
      wait: [sum tumbling:1d, max session:30m:6h, ewma 1h]  # see windows.py
      temp: [latest]               # temp_latest
    tile: 5m                       # optional, as are version, resolution, retention and lateness
    entities: 100000               # how many there may be in one process, for the memory budget
    corrects: replaces             # optional: the event's column with the id of the event that it
    retracts: removes              # takes the place of, or that it only removes
```
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from services.features.domain.definitions import (
    AGGREGATIONS,
    DEFAULT_ENTITIES,
    DEFAULT_RESOLUTION,
    UNDIVIDED,
    WINDOWLESS,
    Aggregation,
    Feature,
    FeatureView,
    InputColumn,
    by_reference,
)
from services.features.domain.durations import parse_duration
from services.features.domain.failures import DefinitionError
from services.features.domain.windows import half_life, parse_window

PARAMETERS = frozenset({"quantile", "top", "share"})
_NUMBERED = re.compile(r"(?:p(?P<q>\d{1,2}(?:\.\d{1,3})?)|(?P<kind>top|share)(?P<k>[1-9]\d?))\Z")
_KEYS = frozenset(
    [
        "version",
        "event",
        "entity",
        "scope",
        "placement",
        "filter",
        "columns",
        "windows",
        "features",
        "tile",
        "resolution",
        "retention",
        "lateness",
        "corrects",
        "entities",
        "retracts",
    ]
)


def parse_views(document: Mapping[str, Any]) -> list[FeatureView]:
    """Read `{"views": {name: view}}` as in the module's example, or raise DefinitionError."""
    views = document.get("views")
    if not isinstance(views, Mapping) or not views:
        raise DefinitionError("a feature document needs `views:` with at least one view")
    found = [_view(str(name), body) for name, body in views.items()]
    by_reference(found)  # refuses one name and version twice
    return found


def _view(name: str, body: object) -> FeatureView:
    if not isinstance(body, Mapping):
        raise DefinitionError(f"view {name!r}: expected keys such as `event` and `features`")
    unknown = sorted(set(body) - _KEYS)
    if unknown:
        raise DefinitionError(f"view {name!r}: unknown key {unknown[0]!r}; known: {sorted(_KEYS)}")
    try:
        return _build(*_versioned(name, body), body)
    except (TypeError, ValueError) as error:
        raise DefinitionError(f"view {name!r}: {error}") from error


def _versioned(name: str, body: Mapping[str, Any]) -> tuple[str, int]:
    """`door_traffic@v2`, or the name alone and `version: 2` (1 by default)."""
    bare, at, version = name.partition("@v")
    if not at:
        return name, int(body.get("version", 1))
    if "version" in body and str(body["version"]) != version:
        raise ValueError(f"the name says v{version}, `version` says {body['version']}")
    return bare, int(version)


def _build(name: str, version: int, body: Mapping[str, Any]) -> FeatureView:
    requested, keyed_by = _entity(body.get("entity"))
    windows = tuple(str(window) for window in _list(body.get("windows", [])))
    features = tuple(_features(body.get("features"), windows))
    return FeatureView(
        name=name,
        version=version,
        event_type=str(body.get("event", "")),
        entity=keyed_by,
        request_entity=requested,
        scope=body.get("scope", "tenant"),
        placement=body.get("placement", "partitioned"),
        columns=_columns(body.get("columns", {}), features),
        filter=None if body.get("filter") is None else str(body["filter"]),
        features=features,
        tile_us=parse_duration(body["tile"]) if "tile" in body else 0,
        resolution=float(body.get("resolution", DEFAULT_RESOLUTION)),
        lateness_us=_lateness(body.get("lateness")),
        corrects=None if body.get("corrects") is None else str(body["corrects"]),
        retracts=None if body.get("retracts") is None else str(body["retracts"]),
        entities=int(body.get("entities", DEFAULT_ENTITIES)),
        retention_us=parse_duration(body["retention"]) if "retention" in body else None,
    )


def _lateness(value: object) -> int | None:
    """How late an event may come: a duration, or 0."""
    return None if value is None else 0 if value == 0 else parse_duration(value)


def _entity(entity: object) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The request's and the event's names of the entity columns."""
    if isinstance(entity, Mapping):
        return tuple(map(str, entity)), tuple(map(str, entity.values()))
    names = tuple(str(name) for name in _list(entity))
    return names, names


def _features(body: object, windows: tuple[str, ...]) -> Iterator[Feature]:
    if not isinstance(body, Mapping):
        raise ValueError("`features` must map a column (or '*') to a list of aggregations")
    for column, aggregations in body.items():
        for item in _list(aggregations):
            word, *own = str(item).split()
            kind, parameter = _aggregation(word)
            suffix = word.replace(".", "_")
            name = "_".join([suffix] if column == "*" else [str(column), suffix])
            if own and kind in WINDOWLESS:
                raise ValueError(f"{item!r}: {kind} takes no window")
            source = None if column == "*" else str(column)
            if kind == "ewma" and not own:
                raise ValueError(f"{name} names no half-life: write `ewma 1h`")
            for feature in _over(kind, name, source, tuple(own) or windows):
                yield replace(feature, parameter=parameter)


def _aggregation(word: str) -> tuple[Aggregation, float]:
    """`mean`, or one with a number: `p99.9`, `top3`, `share3`."""
    if word in AGGREGATIONS and word not in PARAMETERS:
        return word, 0.0
    found = _NUMBERED.match(word)
    if found is None:
        known = [name for name in AGGREGATIONS if name not in PARAMETERS]
        raise ValueError(
            f"unknown aggregation {word!r}; known: {', '.join(known)}, p50 (any), top1, share1"
        )
    if found["q"]:
        return "quantile", float(found["q"]) / 100
    return ("top" if found["kind"] == "top" else "share"), float(found["k"])


def _over(
    kind: Aggregation, name: str, column: str | None, windows: tuple[str, ...]
) -> Iterator[Feature]:
    if kind in WINDOWLESS:
        yield Feature(name, kind, column)
        return
    if not windows:
        raise ValueError(f"{name} has no window: write `windows: [3h]` or `{kind} 3h`")
    for text in windows:
        yield _windowed(kind, name, column, text)


def _windowed(kind: Aggregation, name: str, column: str | None, text: str) -> Feature:
    first, _, per = text.partition("/")
    if per and kind in UNDIVIDED:
        raise ValueError(f"{kind} {text}: {kind} takes no second window")
    window = half_life(first) if kind == "ewma" else parse_window(first)
    full_name = f"{name}_{text.replace('/', '_per_').replace(':', '_')}"
    per_us = parse_duration(per) if per else None
    return Feature(full_name, kind, column, window.length_us, window.shape, window.part_us, per_us)


def _columns(body: object, features: tuple[Feature, ...]) -> tuple[InputColumn, ...]:
    if not isinstance(body, Mapping):
        raise ValueError("`columns` must map a name to a column or an expression")
    named = {str(name): str(expression) for name, expression in body.items()}
    for feature in features:
        if feature.column is not None:
            # quoted, so that a column called `left` or `order` is read as a name
            named.setdefault(feature.column, f'"{feature.column}"')
    return tuple(InputColumn(name, expression) for name, expression in named.items())


def _list(value: object) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]
