"""Bring a frame to the column types of its record, or say which value does not fit.

What holds the same value passes: any integer where it is in range, integers as floats, categories
as strings, an instant of any unit or zone (one without a zone is UTC; finer units round down).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import polars as pl

from causemesh.codec.columns import frame_schema


class MisfitError(ValueError):
    """A value does not fit its field. `row` is the first such row of the column at `path`."""

    def __init__(self, row: int, path: str, why: str) -> None:
        super().__init__(f"row {row} does not fit its schema: column {path}: {why}")
        self.row, self.path, self.why = row, path, why

    def inside(self, row: int) -> MisfitError:
        """The same misfit, seen from the row of an enclosing frame."""
        return MisfitError(row, self.path, self.why)


class Conformer:
    """Brings frames to the columns of one record, in its order."""

    def __init__(self, record: Mapping[str, Any]) -> None:
        self._target = frame_schema(record)
        self._names, self._types = self._target.names(), self._target.dtypes()

    def conform(self, frame: pl.DataFrame) -> pl.DataFrame:
        """The record's columns with their types. Raises MisfitError; ValueError for no column."""
        if frame.columns == self._names and frame.dtypes == self._types:
            return frame
        columns = [self._column(frame, name, target) for name, target in self._target.items()]
        return pl.DataFrame(columns)

    def _column(self, frame: pl.DataFrame, name: str, target: Any) -> pl.Series:
        try:
            series = frame.get_column(name)
        except pl.exceptions.ColumnNotFoundError:
            raise ValueError(
                f"column {name} is missing; the record has {[*self._target]}"
            ) from None
        if series.dtype == target:
            return series
        if series.null_count() == len(series):
            return pl.Series(name, [None], dtype=target).new_from_index(0, len(series))
        wrong = _refusal(series.dtype, target)
        if wrong is not None:
            raise MisfitError(_first_present(series), name + wrong[0], wrong[1])
        return _cast(series, name, target)


def _cast(series: pl.Series, name: str, target: Any) -> pl.Series:
    reshaped = _reshaped(pl.col(name), series.dtype, target).alias(name)
    frame = series.to_frame()
    try:
        return frame.select(reshaped).get_column(name)
    except pl.exceptions.InvalidOperationError as error:
        row = _first_failure(frame, reshaped)
        raise MisfitError(row, name, f"{series[row]!r} is out of range for {target}") from error


def _first_failure(frame: pl.DataFrame, expression: pl.Expr) -> int:
    """The first row on which `expression` raises, by bisection; some row does."""
    fine, failing = 0, frame.height
    while failing - fine > 1:
        middle = (fine + failing) // 2
        try:
            frame.head(middle).select(expression)
            fine = middle
        except pl.exceptions.InvalidOperationError:
            failing = middle
    return failing - 1


def _first_present(series: pl.Series) -> int:
    return int(series.is_not_null().to_numpy().argmax())


def _reshaped(value: pl.Expr, source: Any, target: Any) -> pl.Expr:
    """`value` as `target`; polars casts no struct to one with other fields, so field by field."""
    if source == target:
        return value
    if isinstance(target, pl.Struct) and isinstance(source, pl.Struct):
        held = dict(source)
        fields = [
            _reshaped(value.struct.field(field.name), held[field.name], field.dtype)
            if field.name in held
            else pl.lit(None, dtype=field.dtype)
            for field in target.fields
        ]
        named = [part.alias(f.name) for part, f in zip(fields, target.fields, strict=True)]
        return pl.when(value.is_not_null()).then(pl.struct(named))
    if isinstance(target, pl.List) and isinstance(source, (pl.List, pl.Array)):
        items = value.cast(pl.List(source.inner))
        return items.list.eval(_reshaped(pl.element(), source.inner, target.inner))
    return value.cast(target)


def _refusal(source: Any, target: Any) -> tuple[str, str] | None:
    """Where below the column, and why, columns of type `source` can't become `target`."""
    if source in (target, pl.Null):
        return None
    if isinstance(target, pl.Struct) and isinstance(source, pl.Struct):
        held = dict(source)
        shared = [field for field in target.fields if field.name in held]
        below = ((f".{f.name}", _refusal(held[f.name], f.dtype)) for f in shared)
        return next(((at + why[0], why[1]) for at, why in below if why), None)
    if isinstance(target, pl.List) and isinstance(source, (pl.List, pl.Array)):
        why = _refusal(source.inner, target.inner)
        return why and ("[]" + why[0], why[1])
    if _fits(source, target):
        return None
    return "", f"its type is {source}, which is not {target}; cast it"


_FITS: dict[Any, Callable[[Any], bool]] = {
    pl.Int32: lambda source: source.is_integer(),
    pl.Int64: lambda source: source.is_integer(),
    pl.Float32: lambda source: source.is_integer() or source.is_float(),
    pl.Float64: lambda source: source.is_integer() or source.is_float(),
    pl.String: lambda source: source in (pl.Categorical, pl.Enum),
    pl.Datetime: lambda source: source.is_integer() or source == pl.Datetime,
    pl.Date: lambda source: source.is_integer(),
}


def _fits(source: Any, target: Any) -> bool:
    rule = _FITS.get(target.base_type())
    return rule is not None and rule(source)
