"""Events of one view as columns, on the view's grid.

Reading an event needs no state: the filter, the expressions and the rounding happen here, once, and
a re-keyed topic can carry the result (`frame`, `from_frame`) bit for bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl
from polars.exceptions import ColumnNotFoundError, PolarsError

from causemesh.errors import Misdeclared, Poison
from services.features.domain.definitions import OF_TEXTS, FeatureView

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

# Stands for a null input; no value on a grid comes near it.
NULL = np.iinfo(np.int64).min
# |q| up to here leaves room for 2**23 events in a window before a sum leaves int64 ...
SUM_LIMIT = 2**40
# ... and where squares are kept, q * q itself must fit (its two halves are summed apart).
SQUARE_LIMIT = 2**31
MAX_KEY_BYTES = 1024
# Room for every sum and difference of times and windows in int64.
MAX_TIME_US = 2**55
_TEXTS = (pl.String, pl.Categorical, pl.Enum)
# So few rows are joined sooner one by one than by an expression.
FEW = 128
# Between the parts of a composite entity key.
SEPARATOR = "\x1f"


@dataclass(frozen=True)
class ViewEvents:
    """`n` events of one view.

    entity: the key, n strings; occurred_at_us: event time, microseconds since the epoch;
    source, position: the tie-break; values: int64 [columns, n] in grid units, NULL where absent.
    """

    entity: pl.Series
    occurred_at_us: Ints
    source: Ints
    position: Ints
    values: Ints

    def __len__(self) -> int:
        return len(self.occurred_at_us)

    @staticmethod
    def none(view: FeatureView) -> ViewEvents:
        """No event of a view."""
        empty = np.empty(0, np.int64)
        values = np.empty((len(view.columns), 0), np.int64)
        return ViewEvents(pl.Series("entity", [], dtype=pl.String), empty, empty, empty, values)

    @staticmethod
    def concatenate(parts: Sequence[ViewEvents]) -> ViewEvents:
        """The events of one or more parts, in their order."""
        return ViewEvents(
            pl.concat([part.entity.rename("entity") for part in parts]),
            np.concatenate([part.occurred_at_us for part in parts]),
            np.concatenate([part.source for part in parts]),
            np.concatenate([part.position for part in parts]),
            np.concatenate([part.values for part in parts], axis=1),
        )

    def take(self, chosen: Ints) -> ViewEvents:
        """The chosen events, in the order chosen."""
        return ViewEvents(
            self.entity.gather(chosen),
            self.occurred_at_us[chosen],
            self.source[chosen],
            self.position[chosen],
            self.values[:, chosen],
        )

    def frame(self, view: FeatureView) -> pl.DataFrame:
        """The same as a frame: entity, occurred_at_us, source, position, one column an input."""
        inputs = {c.name: _nullable(q) for c, q in zip(view.columns, self.values, strict=True)}
        return pl.DataFrame(
            {
                "entity": self.entity,
                "occurred_at_us": self.occurred_at_us,
                "source": self.source,
                "position": self.position,
                **{f"value.{name}": series for name, series in inputs.items()},
            }
        )

    @staticmethod
    def from_frame(view: FeatureView, frame: pl.DataFrame) -> ViewEvents:
        """What `frame` wrote, read back."""
        values = [frame[f"value.{c.name}"].fill_null(NULL).to_numpy() for c in view.columns]
        return ViewEvents(
            frame["entity"],
            int64(frame, "occurred_at_us"),
            int64(frame, "source"),
            int64(frame, "position"),
            np.array(values, np.int64).reshape(len(view.columns), frame.height),
        )


def event_columns(view: FeatureView) -> tuple[str, ...]:
    """The columns of an event that reading it for the view needs, each once."""
    texts = [*(column.expression for column in view.columns), *filter(None, [view.filter])]
    read = [name for text in texts for name in pl.sql_expr(text).meta.root_names()]
    return tuple(dict.fromkeys(["tenant_id", "occurred_at", *view.entity, *read]))


def read_events(view: FeatureView, frame: pl.DataFrame) -> ViewEvents:
    """The events of `frame` that `view` sees: those that pass its filter and name its entity.

    `frame` has the event's own columns plus tenant_id, occurred_at_us, source and position. Raises
    Misdeclared when a column is missing or is no number, Poison naming the rows (of `frame`) whose
    inputs are infinite or too large for the view's resolution.
    """
    try:
        seen = frame.with_row_index("__row").with_columns(
            entity_keys(frame, view, view.entity).alias("__entity")
        )
        kept = seen.filter(pl.col("__entity").is_not_null())
        if view.filter is not None:
            kept = kept.filter(pl.sql_expr(view.filter))
        inputs = kept.select(pl.sql_expr(c.expression).alias(c.name) for c in view.columns)
    except (ColumnNotFoundError, PolarsError) as error:
        raise Misdeclared(f"view {view.name!r} cannot read {view.event_type}: {error}") from error
    values = np.empty((len(view.columns), kept.height), np.int64)
    bad = _unfit(view, kept)
    for place, column in enumerate(view.columns):
        if inputs[column.name].dtype.base_type() in _TEXTS:
            values[place] = _text_units(view, inputs[column.name])
            continue
        limit = SQUARE_LIMIT if _squared(view, column.name) else SUM_LIMIT
        values[place], wrong = quantise(_numbers(view, inputs[column.name]), view, limit)
        reason = f"view {view.name}: {column.name} is infinite or beyond {limit * view.resolution}"
        bad.update(dict.fromkeys(kept["__row"].gather(np.flatnonzero(wrong)).to_list(), reason))
    if bad:
        raise Poison(bad)
    return ViewEvents(
        kept["__entity"],
        int64(kept, "occurred_at_us"),
        int64(kept, "source"),
        int64(kept, "position"),
        values,
    )


def readable_events(view: FeatureView, frame: pl.DataFrame) -> tuple[ViewEvents, dict[int, str]]:
    """What `view` sees of `frame` (see `read_events`), and the rows it cannot take, with reasons.

    Those rows are no events of this view; others may take them.
    """
    try:
        return read_events(view, frame), {}
    except Poison as poison:
        fit = ~frame.select(pl.int_range(pl.len()).is_in(list(poison.rows))).to_series()
        return read_events(view, frame.filter(fit)), dict(poison.rows)


def _unfit(view: FeatureView, kept: pl.DataFrame) -> dict[int, str]:
    """The rows whose key is too long or whose time is no time, and why."""
    long = kept["__entity"].str.len_bytes() > MAX_KEY_BYTES
    times = kept["occurred_at_us"].cast(pl.Int64)
    reasons = {
        f"view {view.name}: an entity key of more than {MAX_KEY_BYTES} bytes": long,
        f"view {view.name}: an event time outside of the years 829 to 3111": times.abs()
        > MAX_TIME_US,
    }
    return {
        row: reason
        for reason, wrong in reasons.items()
        if wrong.any()
        for row in kept["__row"].filter(wrong).to_list()
    }


def quantise(numbers: Floats, view: FeatureView, limit: int) -> tuple[Ints, npt.NDArray[np.bool_]]:
    """Numbers on the view's grid (NaN becomes NULL), and which of them are out of range."""
    units = np.rint(numbers / view.resolution)
    absent = np.isnan(units)
    wrong = np.abs(units) > limit
    grid = np.where(absent | wrong, 0.0, units).astype(np.int64)
    grid[absent] = NULL
    return grid, wrong


def entity_keys(frame: pl.DataFrame, view: FeatureView, columns: Sequence[str]) -> pl.Series:
    """The key of each row for `view`: null where a part is null; the tenant first where it counts.

    All parts but the last are escaped, so different parts never make the same key.
    """
    names = [*(["tenant_id"] if view.scope == "tenant" else []), *columns]
    if len(names) == 1:
        return frame[names[0]].cast(pl.String).alias("entity")
    if frame.height <= FEW:
        texts = [frame[name].cast(pl.String).to_list() for name in names]
        return pl.Series("entity", joined_keys(texts), dtype=pl.String)
    parts = [pl.col(name).cast(pl.String) for name in names]
    escaped = [
        part.str.replace_all("\x1e", "\x1e0", literal=True).str.replace_all(
            SEPARATOR, "\x1e1", literal=True
        )
        for part in parts[:-1]
    ]
    return frame.select(
        pl.concat_str([*escaped, parts[-1]], separator=SEPARATOR).alias("entity")
    ).to_series()


def joined_keys(columns: Sequence[Sequence[str | None]]) -> list[str | None]:
    """The same one by one, from the texts of two columns or more."""
    *first, last = columns
    parts = [*map(_escaped, first), last]
    if not any(None in column for column in parts):
        return list(map(SEPARATOR.join, zip(*parts, strict=True)))
    return [None if None in row else SEPARATOR.join(row) for row in zip(*parts, strict=True)]


def _escaped(column: Sequence[str | None]) -> list[str | None]:
    """Without the separator; most parts, such as the tenant, are the same in many rows."""
    escapes: dict[str | None, str] = {
        part: part.replace("\x1e", "\x1e0").replace(SEPARATOR, "\x1e1")
        for part in set(column)
        if part is not None
    }
    return [escapes.get(part) for part in column]


def int64(frame: pl.DataFrame, name: str) -> Ints:
    """A column of whole numbers as an array of its own; Misdeclared when it has nulls."""
    series = frame[name]
    if series.null_count():
        raise Misdeclared(f"column {name!r} must not be null")
    return series.cast(pl.Int64).to_numpy(writable=True)


def _squared(view: FeatureView, column: str) -> bool:
    return any(f.column == column and f.aggregation == "std" for f in view.features)


def _text_units(view: FeatureView, series: pl.Series) -> Ints:
    """Whole numbers that stand for texts: 52 bits of BLAKE2, the same in every process.

    So few bits that a float64 holds them: they travel on features.inputs.v1 as one.
    """
    wrong = {f.aggregation for f in view.features if f.column == series.name} - OF_TEXTS
    if wrong:
        raise Misdeclared(
            f"view {view.name!r}: {series.name} is a text, not a number: it has no {min(wrong)}"
        )
    texts = series.cast(pl.String)
    known: dict[str | None, int] = {None: NULL}
    for text in texts.unique().drop_nulls().to_list():
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        known[text] = int.from_bytes(digest, "little") >> 12
    return np.fromiter((known[text] for text in texts.to_list()), np.int64, len(texts))


def _numbers(view: FeatureView, series: pl.Series) -> Floats:
    """An evaluated input as float64, NaN where null; a duration counts in seconds."""
    if isinstance(series.dtype, pl.Duration):
        series = series.dt.total_microseconds() / 1e6
    if not (series.dtype.is_numeric() or series.dtype in (pl.Boolean, pl.Null)):
        raise Misdeclared(f"view {view.name!r}: {series.name} is {series.dtype}, not a number")
    return series.cast(pl.Float64).fill_null(float("nan")).to_numpy(writable=True)


def _nullable(values: Ints) -> pl.Series:
    return pl.Series(values).replace(NULL, None) if len(values) else pl.Series([], dtype=pl.Int64)
