"""Feature views as data: what is aggregated, over which windows, for which entity."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from typing import Literal, get_args

from causemesh.expressions import check_expression
from services.features.domain.durations import default_tile
from services.features.domain.failures import DefinitionError
from services.features.domain.windows import Shape, Window, ordered, window_problems

Aggregation = Literal[
    "count",
    "sum",
    "mean",
    "min",
    "max",
    "std",
    "first",
    "last",
    "ewma",
    "distinct",
    "quantile",
    "top",
    "share",
    "latest",
    "age",
]
Scope = Literal["tenant", "shared"]
Placement = Literal["partitioned", "rekeyed", "broadcast"]

AGGREGATIONS: tuple[Aggregation, ...] = get_args(Aggregation)
WINDOWLESS = frozenset({"latest", "age"})
COLUMNLESS = frozenset({"count", "age"})
RANKED = frozenset({"top", "share"})
# What can be said of a text as well as of a number: it is read as a number that stands for it.
OF_TEXTS = frozenset({"count", "distinct", "share"})
UNDIVIDED = WINDOWLESS | {"ewma"}
NAME = re.compile(r"[a-z][a-z0-9_]{0,62}\Z")

# A ring row costs 8 bytes x tiles x primitives for every entity, so a window is cut no finer.
MAX_TILES = 4096
CORRECTION_COLUMNS = ("event_id__", "target__", "void__")
DEFAULT_ENTITIES = 100_000
_NEVER_US = -(2**62)
DEFAULT_RESOLUTION = 2.0**-10


@dataclass(frozen=True)
class InputColumn:
    """One numeric input of a view: a column of the event, or a row-wise SQL expression over it."""

    name: str
    expression: str


@dataclass(frozen=True)
class Feature:
    """One number of the vector. `window_us` is None for `latest` and `age`.

    `shape` and `part_us` (a session's gap, the half-life of an ewma) complete the window; where
    `per_us` is given, the number is divided by the same one over a sliding window of that length.
    `parameter` is the q of a quantile (0 to 1) and the k of `top` and `share`.
    """

    name: str
    aggregation: Aggregation
    column: str | None = None
    window_us: int | None = None
    shape: Shape = "sliding"
    part_us: int = 0
    per_us: int | None = None
    parameter: float = 0.0

    @property
    def window(self) -> Window | None:
        """The window; None for `latest` and `age`."""
        return None if self.window_us is None else Window(self.window_us, self.shape, self.part_us)

    @property
    def per(self) -> Window | None:
        """The window of the denominator; None where there is none."""
        return None if self.per_us is None else Window(self.per_us)


@dataclass(frozen=True)
class FeatureView:
    """Features of one entity, computed from one event type.

    `entity` names the event's columns, `request_entity` the request's (the same by default); in
    scope `tenant` every tenant has state of its own, in scope `shared` all share one. `tile_us` is
    the hop of the windows: the smallest change of time that moves a window's edge. `resolution` is
    the grid that inputs are rounded to. `retention_us` bounds the age of `latest` and lets an idle
    entity be forgotten. `lateness_us` is how far behind the watermark an event may come (None: as
    long as an answer to come can see it). `corrects` and `retracts` name the event's columns that
    hold the id of the event it takes the place of, or removes. `entities` is how many there may be
    in one process: what the memory budget is checked for.

    Raises DefinitionError when the parts do not fit together.
    """

    name: str
    event_type: str
    entity: tuple[str, ...]
    features: tuple[Feature, ...]
    columns: tuple[InputColumn, ...] = ()
    version: int = 1
    scope: Scope = "tenant"
    placement: Placement = "partitioned"
    filter: str | None = None
    tile_us: int = 0
    resolution: float = DEFAULT_RESOLUTION
    retention_us: int | None = None
    lateness_us: int | None = None
    corrects: str | None = None
    retracts: str | None = None
    entities: int = DEFAULT_ENTITIES
    request_entity: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        kept = {column.name for column in self.columns}
        if (self.corrects or self.retracts) and not kept.issuperset(CORRECTION_COLUMNS):
            object.__setattr__(self, "columns", self.columns + _correction_columns(self))
        if not self.request_entity:
            object.__setattr__(self, "request_entity", self.entity)
        if not self.tile_us:
            try:
                lengths = [length for window in self.windows for length in window.lengths]
                object.__setattr__(self, "tile_us", default_tile(lengths))
            except ValueError as error:
                raise DefinitionError(f"view {self.name!r}: {error}") from error
        _check_view(self)

    @property
    def id(self) -> str:
        """name@vN, as on the topics."""
        return f"{self.name}@v{self.version}"

    @cached_property
    def windows(self) -> tuple[Window, ...]:
        """The distinct windows, sliding ones first, shortest first."""
        found = [w for f in self.features for w in (f.window, f.per) if w is not None]
        return ordered(found)

    @cached_property
    def tiles(self) -> int:
        """How many tiles an answer may look at; 0 when no feature has a window."""
        return max((window.reach_us for window in self.windows), default=0) // self.tile_us

    def taken_from_us(self, applied_until_us: int) -> int:
        """The earliest event time that is not too late once all events until then are applied."""
        from_us = _NEVER_US
        if self.lateness_us is not None:
            from_us = applied_until_us - self.lateness_us
        if all(feature.window_us is not None for feature in self.features):
            oldest_tile = (applied_until_us - 1) // self.tile_us - self.tiles + 1
            from_us = max(from_us, oldest_tile * self.tile_us)
        return from_us

    @property
    def feature_names(self) -> tuple[str, ...]:
        """The full names, `view.feature`, in the order of the answer's columns."""
        return tuple(f"{self.name}.{feature.name}" for feature in self.features)

    @property
    def fingerprint(self) -> str:
        """A digest of everything that the meaning of stored state depends on."""
        meaning = replace(self, entities=DEFAULT_ENTITIES)
        return hashlib.sha256(repr(meaning).encode()).hexdigest()[:32]


def _correction_columns(view: FeatureView) -> tuple[InputColumn, ...]:
    """The event's id, the id it takes the place of or removes, and whether it only removes.

    All three are texts, so that the view's resolution leaves them alone.
    """
    targets = [f'cast("{name}" AS VARCHAR)' for name in (view.corrects, view.retracts) if name]
    target = targets[0] if len(targets) == 1 else f"coalesce({', '.join(targets)})"
    void = f'"{view.retracts}" IS NOT NULL' if view.retracts else '"event_id" IS NULL'
    expressions = ('cast("event_id" AS VARCHAR)', target, f"CASE WHEN {void} THEN 'void' END")
    return tuple(map(InputColumn, CORRECTION_COLUMNS, expressions))


def by_reference(views: Iterable[FeatureView]) -> dict[str, FeatureView]:
    """The views by all that may name them: `name@vN`, and `name` alone for the lowest version.

    The lowest, so that adding a version changes nothing for those who named none. Raises
    DefinitionError when two views are of one name and version.
    """
    found: dict[str, FeatureView] = {}
    for view in sorted(views, key=lambda view: view.version):
        if view.id in found:
            raise DefinitionError(f"view {view.id!r} is defined twice: give one another version")
        found[view.id] = view
        found.setdefault(view.name, view)
    return found


def _check_view(view: FeatureView) -> None:
    for problem in chain(_header_problems(view), _window_problems(view), _column_problems(view)):
        raise DefinitionError(f"view {view.name!r}: {problem}")


def _header_problems(view: FeatureView) -> list[str]:
    checks = {
        f"the name must match {NAME.pattern}": bool(NAME.match(view.name)),
        "the version must be 1 or more": view.version >= 1,
        "it names no event type": bool(view.event_type),
        "it names no entity column": bool(view.entity) and all(view.entity),
        "the request needs one column for every entity column": len(view.request_entity)
        == len(view.entity),
        f"scope must be one of {get_args(Scope)}": view.scope in get_args(Scope),
        f"placement must be one of {get_args(Placement)}": view.placement in get_args(Placement),
        "resolution must be a positive number": math.isfinite(view.resolution)
        and view.resolution > 0,
        "retention must be positive": view.retention_us is None or view.retention_us > 0,
        "entities must be 1 or more": view.entities >= 1,
        "lateness must be 0 or more": view.lateness_us is None or view.lateness_us >= 0,
        "corrections need a retention where a feature has no window (latest, age)": not (
            view.corrects or view.retracts
        )
        or view.retention_us is not None
        or all(feature.window_us is not None for feature in view.features),
        "it has no features": bool(view.features),
    }
    return [problem for problem, holds in checks.items() if not holds]


def _window_problems(view: FeatureView) -> list[str]:
    if view.tile_us <= 0:
        return ["the tile must be longer than 0"]
    problems = [p for window in view.windows for p in window_problems(window, view.tile_us)]
    if view.tiles > MAX_TILES:
        problems.append(f"the longest window has {view.tiles} tiles, more than {MAX_TILES}")
    return problems


def _column_problems(view: FeatureView) -> list[str]:
    problems = _duplicates("feature", [f.name for f in view.features])
    problems += _duplicates("column", [c.name for c in view.columns])
    known = {column.name for column in view.columns}
    for feature in view.features:
        problems += [f"feature {feature.name!r} {p}" for p in _feature_problems(feature, known)]
    for text in [column.expression for column in view.columns] + [view.filter]:
        problem = check_expression(text) if text is not None else None
        problems += [problem] if problem else []
    return problems


def _feature_problems(feature: Feature, columns: set[str]) -> list[str]:
    kind = feature.aggregation
    checks = {
        f"must match {NAME.pattern}": bool(NAME.match(feature.name)),
        f"has the unknown aggregation {kind!r}": kind in AGGREGATIONS,
        "needs a window": feature.window_us is not None or kind in WINDOWLESS,
        f"takes no window ({kind})": feature.window_us is None or kind not in WINDOWLESS,
        "takes a half-life, and nothing else does": (feature.shape == "decayed")
        == (kind == "ewma"),
        "needs a quantile between 0 and 1": kind != "quantile" or 0 <= feature.parameter <= 1,
        "needs a whole k from 1 on": kind not in RANKED
        or (feature.parameter >= 1 and float(feature.parameter).is_integer()),
        "takes no second window": feature.per_us is None or kind not in UNDIVIDED,
        f"needs a column ({kind})": feature.column is not None or kind in COLUMNLESS,
        "takes no column (age)": feature.column is None or kind != "age",
        f"reads the undeclared column {feature.column!r}": feature.column is None
        or feature.column in columns,
    }
    return [problem for problem, holds in checks.items() if not holds]


def _duplicates(what: str, names: Sequence[str]) -> list[str]:
    return [f"{what} {name!r} is defined twice" for name in set(names) if names.count(name) > 1]
