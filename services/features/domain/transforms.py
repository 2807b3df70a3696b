"""On-demand features: expressions over view features and the request's inputs, at request time.

```yaml
on_demand:
  ratios:                           # or ratios@v2, beside the first version
    per_mile: origin_departures.delay_mean_1h / input.distance_miles
    much: ratios.per_mile > 2       # others may be built upon
```

A model asks for `ratios.per_mile` as for any feature. Expressions are SQL over one row (see
`causemesh.expressions`); names are written as `view.feature`, `view@v2.feature` or `input.name`. A
value that is missing is null there, so `coalesce(input.x, 0)` says what else to take; a result that
is null, NaN or infinite is missing.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from typing import Any

import numpy as np
import polars as pl
from polars.exceptions import PolarsError

from causemesh.expressions import check_expression
from services.features.domain.definitions import NAME
from services.features.domain.failures import DefinitionError
from services.features.domain.vectors import Vectors

INPUT = "input."
_QUOTED = re.compile(r"('(?:[^']|'')*')")
_REFERENCE = re.compile(r"\b([a-z_][a-z0-9_]*(?:@v[1-9][0-9]*)?\.[a-z_][a-z0-9_]*)")
_GROUP = re.compile(r"([a-z][a-z0-9_]{0,62})(?:@v([1-9][0-9]*))?\Z")


@dataclass(frozen=True)
class Transform:
    """One on-demand feature; `reads` are the names in its expression, which are quoted."""

    name: str
    expression: str
    reads: tuple[str, ...]


class Transforms:
    """All on-demand features. Raises DefinitionError for unknown names and for cycles."""

    def __init__(self, transforms: Sequence[Transform] = (), known: Collection[str] = ()) -> None:
        by_name = {one.name: one for one in transforms}
        for one in transforms:
            bare = re.sub(r"@v[0-9]+", "", one.name)
            lowest = by_name.get(bare)
            if lowest is None or _version(one.name) < _version(lowest.name):
                by_name[bare] = one
        self._by_name = by_name
        self._order: list[str] = []
        for one in transforms:
            self._check(one, known)
        self._order = self._ordered()

    @property
    def names(self) -> tuple[str, ...]:
        """All names that a signature may use."""
        return tuple(self._by_name)

    def sources(self, features: Sequence[str]) -> tuple[str, ...]:
        """The view features and inputs that these features are made from, each once."""
        found: dict[str, None] = {}
        for name in features:
            transform = self._by_name.get(name)
            found |= dict.fromkeys(self.sources(transform.reads) if transform else (name,))
        return tuple(found)

    def digest(self, features: Sequence[str]) -> str:
        """What tells a change of meaning of these features; empty where none is on demand."""
        used = self._used(features)
        text = "\n".join(f"{name}={self._by_name[name].expression}" for name in used)
        return hashlib.sha256(text.encode()).hexdigest()[:16] if used else ""

    def compute(self, features: Sequence[str], sources: Sequence[str], matrix: Vectors) -> Vectors:
        """The features from their sources: float32 [n, features] from float32 [n, sources]."""
        frame = pl.DataFrame(
            {name: matrix[:, place].astype(np.float64) for place, name in enumerate(sources)}
        ).fill_nan(None)
        for name in self._used(features):
            found = pl.sql_expr(self._by_name[name].expression)
            frame = frame.with_columns(found.cast(pl.Float64).fill_nan(None).alias(name))
        out = np.empty((len(matrix), len(features)), np.float32)
        for place, name in enumerate(features):
            numbers = frame[name].to_numpy()  # a null comes out as NaN
            out[:, place] = np.where(np.isfinite(numbers), numbers, np.nan)
        return out

    def _used(self, features: Sequence[str]) -> list[str]:
        """The on-demand features needed, those that others are built upon first."""
        needed: set[str] = set()
        asked = [name for name in features if name in self._by_name]
        while asked:
            name = asked.pop()
            if name not in needed:
                needed.add(name)
                asked += [read for read in self._by_name[name].reads if read in self._by_name]
        return [name for name in self._order if name in needed]

    def _check(self, one: Transform, known: Collection[str]) -> None:
        problem = check_expression(one.expression)
        if problem:
            raise DefinitionError(f"on-demand feature {one.name!r}: {problem}")
        for name in one.reads:
            if not (name.startswith(INPUT) or name in known or name in self._by_name):
                raise DefinitionError(f"on-demand feature {one.name!r} reads the unknown {name!r}")
        empty = pl.DataFrame(schema=dict.fromkeys(one.reads, pl.Float64))
        try:
            empty.select(pl.sql_expr(one.expression).cast(pl.Float64))
        except PolarsError as error:
            raise DefinitionError(f"on-demand feature {one.name!r}: {error}") from error

    def _ordered(self) -> list[str]:
        graph = {
            name: [read for read in one.reads if read in self._by_name]
            for name, one in self._by_name.items()
        }
        try:
            return list(TopologicalSorter(graph).static_order())
        except CycleError as error:
            circle = " -> ".join(reversed(error.args[1]))
            raise DefinitionError(f"on-demand features read each other: {circle}") from error


def _version(name: str) -> int:
    return int(name.partition("@v")[2].partition(".")[0])


def parse_transforms(document: Mapping[str, Any], known: Collection[str]) -> Transforms:
    """Read `{"on_demand": {group: {feature: expression}}}`; known: the names of view features."""
    groups = document.get("on_demand") or {}
    views = {name.partition(".")[0].partition("@")[0] for name in known}
    found: dict[str, Transform] = {}
    for group, features in groups.items():
        parts = _GROUP.match(str(group))
        if parts is None or not isinstance(features, Mapping):
            raise DefinitionError(f"on-demand group {group!r} must be a name with its features")
        if parts[1] in views or parts[1] == "input":
            raise DefinitionError(
                f"on-demand group {group!r} has the name of a view, or is `input`"
            )
        for feature, text in features.items():
            name = f"{parts[1]}@v{parts[2] or 1}.{feature}"
            if name in found or not NAME.match(str(feature)):
                raise DefinitionError(f"on-demand feature {name!r} is defined twice or misnamed")
            found[name] = _transform(name, str(text))
    return Transforms(list(found.values()), known)


def _transform(name: str, text: str) -> Transform:
    """Names outside of quotes become quoted columns."""
    parts = _QUOTED.split(text)
    reads: dict[str, None] = {}
    for place in range(0, len(parts), 2):
        reads |= dict.fromkeys(_REFERENCE.findall(parts[place]))
        parts[place] = _REFERENCE.sub(r'"\1"', parts[place])
    return Transform(name, "".join(parts), tuple(reads))
