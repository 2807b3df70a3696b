"""How the columns of one record become the bytes of its rows.

A plan is made once a record: a tree of nodes in field order, and the polars expressions that they
read. Structs are not nested here: their fields are columns of the same level, with a mask where a
nullable struct is null. Only the items of an array are a level of their own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import polars as pl

from causemesh.codec.columnar_conform import MisfitError
from causemesh.codec.columnar_pieces import (
    Even,
    Mask,
    Piece,
    constant,
    interleave,
    numbers,
    packed,
    where,
)
from causemesh.codec.varint import Bytes, Ints

_NULL, _VALUE = 0, 2  # the branches of [null, T] as varints
_ITEM = "item"
_LOGICAL = frozenset((None, "timestamp-micros", "timestamp-millis", "date"))


class NotColumnarError(Exception):
    """The record holds a type that is written row by row: a map, a decimal, another union."""


@dataclass(frozen=True, slots=True)
class Presence:
    """On which rows the enclosing record is there: `mask` None means on all."""

    mask: Mask | None = None
    absent: int = 0

    def among(self, rows: Mask) -> Mask:
        """Those of `rows` on which it is there."""
        return rows if self.mask is None else rows & self.mask


class Node(Protocol):
    """One field's type."""

    def pieces(self, level: Level, presence: Presence) -> list[Piece]:
        """The pieces of all rows, in order. Raises MisfitError."""


@dataclass
class Plan:
    """The nodes of one level and what polars computes for them, in two selects."""

    by_row: list[pl.Expr] = field(default_factory=list)
    by_level: list[pl.Expr] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)

    def per_row(self, expression: pl.Expr) -> str:
        """Have a value a row computed; returns its name."""
        name = str(len(self.by_row))
        self.by_row.append(expression.alias(name))
        return name

    def per_level(self, expression: pl.Expr) -> int:
        """Have one value a level computed; returns its place."""
        self.by_level.append(expression.alias(str(len(self.by_level))))
        return len(self.by_level) - 1

    def encode(self, frame: pl.DataFrame, before: Sequence[Piece] = ()) -> tuple[Bytes, Ints]:
        """The bytes of a frame that is not empty, and each row's end. Raises MisfitError."""
        totals = frame.select_seq(self.by_level).row(0) if self.by_level else ()
        level = Level(frame, frame.select_seq(self.by_row), totals)
        pieces = [piece for node in self.nodes for piece in node.pieces(level, Presence())]
        return interleave([*before, *pieces], frame.height)


def record_plan(record: Mapping[str, Any]) -> Plan:
    """The plan of a record. Raises NotColumnarError."""
    plan = Plan()
    for each in record["fields"]:
        plan.nodes.append(_node(plan, each["type"], pl.col(each["name"]), each["name"]))
    return plan


@dataclass(frozen=True, slots=True)
class Level:
    """The frame of one level and what polars computed of it."""

    frame: pl.DataFrame
    rows: pl.DataFrame
    totals: tuple[Any, ...]

    def array(self, name: str) -> npt.NDArray[Any]:
        """A value a row, as numpy has it."""
        return self.rows.get_column(name).to_numpy()

    def refuse(self, wrong: pl.Expr, presence: Presence, path: str, why: str) -> MisfitError:
        """The misfit of the first present row for which `wrong` holds."""
        held = self.frame.select(wrong.alias(_ITEM)).get_column(_ITEM).to_numpy()
        return MisfitError(int(presence.among(held).argmax()), path, why)


def _node(plan: Plan, avro: Any, value: pl.Expr, path: str) -> Node:
    if isinstance(avro, list):
        if len(avro) != 2 or avro[0] != "null":
            raise NotColumnarError(path)
        return Nullable(plan, avro[1], value, path)
    if isinstance(avro, str):
        avro = {"type": avro}
    kind, logical = avro["type"], avro.get("logicalType")
    if isinstance(kind, (dict, list)):
        return _node(plan, kind, value, path)
    known = logical in _LOGICAL or (kind, logical) == ("string", "uuid")
    if not known or kind not in _NODES:
        raise NotColumnarError(path)
    return _NODES[kind](plan, avro, value, path)


class _Required(ABC):
    """A value that must be there on every row where its record is."""

    def __init__(self, plan: Plan, avro: Mapping[str, Any], value: pl.Expr, path: str) -> None:
        self._value, self._path = value, path
        self._nulls = plan.per_level(value.null_count())
        self._declare(plan, avro)

    @abstractmethod
    def _declare(self, plan: Plan, avro: Mapping[str, Any]) -> None:
        """Name what the node needs."""

    @abstractmethod
    def _present(self, level: Level, presence: Presence) -> list[Piece]:
        """The pieces, once it is known that no value is missing."""

    def pieces(self, level: Level, presence: Presence) -> list[Piece]:
        """See `Node.pieces`."""
        if level.totals[self._nulls] != presence.absent:
            why = "it is null, and the field is not nullable"
            raise level.refuse(self._value.is_null(), presence, self._path, why)
        return self._present(level, presence)


class Integers(_Required):
    """int, long, and the logical types on them."""

    def _declare(self, plan: Plan, avro: Mapping[str, Any]) -> None:
        self._values = plan.per_row(self._value.to_physical().cast(pl.Int64).fill_null(0))

    def _present(self, level: Level, presence: Presence) -> list[Piece]:
        return [where(presence.mask, numbers(level.array(self._values)))]


class Fractions(_Required):
    """float and double, little-endian."""

    def _declare(self, plan: Plan, avro: Mapping[str, Any]) -> None:
        self._width = 4 if avro["type"] == "float" else 8
        self._values = plan.per_row(self._value.fill_null(0.0))

    def _present(self, level: Level, presence: Presence) -> list[Piece]:
        values = np.ascontiguousarray(level.array(self._values), dtype=f"<f{self._width}")
        return [where(presence.mask, Even(values.view(np.uint8), self._width, self._width))]


class Booleans(_Required):
    """boolean, one byte."""

    def _declare(self, plan: Plan, avro: Mapping[str, Any]) -> None:
        self._values = plan.per_row(self._value.fill_null(False).cast(pl.UInt8))

    def _present(self, level: Level, presence: Presence) -> list[Piece]:
        return [where(presence.mask, Even(level.array(self._values), 1, 1))]


class Texts(_Required):
    """string: its length in bytes, then the bytes."""

    def _declare(self, plan: Plan, avro: Mapping[str, Any]) -> None:
        lengths = self._value.str.len_bytes().cast(pl.Int64).fill_null(0)
        self._lengths = plan.per_row(lengths)
        self._joined = plan.per_level(self._value.str.join("").cast(pl.Binary))

    def _present(self, level: Level, presence: Presence) -> list[Piece]:
        lengths = level.array(self._lengths)
        joined = level.totals[self._joined]
        return [where(presence.mask, numbers(lengths)), packed(joined, lengths)]


class Blobs(_Required):
    """bytes: their length, then themselves; fixed: themselves."""

    def _declare(self, plan: Plan, avro: Mapping[str, Any]) -> None:
        self._size = avro.get("size") if avro["type"] == "fixed" else None
        self._values = plan.per_row(self._value)
        self._lengths = plan.per_row(self._value.bin.size().cast(pl.Int64).fill_null(0))

    def _present(self, level: Level, presence: Presence) -> list[Piece]:
        lengths = level.array(self._lengths)
        values = level.rows.get_column(self._values).to_list()
        joined = b"".join(filter(None, values) if presence.absent else values)
        if self._size is None:
            return [where(presence.mask, numbers(lengths)), packed(joined, lengths)]
        wrong = presence.among(lengths != self._size)
        if wrong.any():
            row = int(wrong.argmax())
            raise MisfitError(row, self._path, f"it has {lengths[row]} bytes, not {self._size}")
        return [packed(joined, lengths)]


class Symbols(_Required):
    """enum: the number of the symbol."""

    def _declare(self, plan: Plan, avro: Mapping[str, Any]) -> None:
        self._symbols = list(avro["symbols"])
        self._known = self._value.cast(pl.Enum(self._symbols), strict=False)
        self._unknown = plan.per_level(self._known.null_count())
        self._codes = plan.per_row(self._known.to_physical().cast(pl.Int64).fill_null(0))

    def _present(self, level: Level, presence: Presence) -> list[Piece]:
        if level.totals[self._unknown] != presence.absent:
            why = f"it is none of {', '.join(self._symbols)}"
            raise level.refuse(self._known.is_null(), presence, self._path, why)
        return [where(presence.mask, numbers(level.array(self._codes)))]


class Records(_Required):
    """record: its fields, one behind the other."""

    def _declare(self, plan: Plan, avro: Mapping[str, Any]) -> None:
        self._fields = [
            _node(
                plan,
                each["type"],
                self._value.struct.field(each["name"]),
                f"{self._path}.{each['name']}",
            )
            for each in avro["fields"]
        ]

    def _present(self, level: Level, presence: Presence) -> list[Piece]:
        return [piece for each in self._fields for piece in each.pieces(level, presence)]


class Arrays(_Required):
    """array: one block of all items with their number before it, then an empty block."""

    def _declare(self, plan: Plan, avro: Mapping[str, Any]) -> None:
        self._lists = plan.per_row(self._value)
        self._counts = plan.per_row(self._value.list.len().cast(pl.Int64).fill_null(0))
        self._items = Plan()
        items = _node(self._items, avro["items"], pl.col(_ITEM), f"{self._path}[]")
        self._items.nodes.append(items)

    def _present(self, level: Level, presence: Presence) -> list[Piece]:
        counts = level.array(self._counts)
        end = where(presence.mask, constant(b"\x00"))
        if not counts.any():
            return [end]
        lists = level.rows.get_column(self._lists)
        items = lists.explode(empty_as_null=False, keep_nulls=False).alias(_ITEM).to_frame()
        last = np.cumsum(counts)
        try:
            data, ends = self._items.encode(items)
        except MisfitError as misfit:
            raise misfit.inside(int(np.searchsorted(last, misfit.row, side="right"))) from None
        bounds = np.concatenate(([0], ends))
        sizes = bounds[last] - bounds[last - counts]
        return [where(counts > 0, numbers(counts)), packed(data, sizes), end]


class Nullable:
    """[null, T]: the branch, then the value if there is one."""

    def __init__(self, plan: Plan, avro: Any, value: pl.Expr, path: str) -> None:
        self._nulls = plan.per_level(value.null_count())
        self._present = plan.per_row(value.is_not_null())
        self._inner = _node(plan, avro, value, path)

    def pieces(self, level: Level, presence: Presence) -> list[Piece]:
        """See `Node.pieces`."""
        nulls = level.totals[self._nulls]
        if nulls == 0:
            return [constant(bytes([_VALUE])), *self._inner.pieces(level, presence)]
        if nulls == level.frame.height:
            return [where(presence.mask, constant(bytes([_NULL])))]
        mask = level.array(self._present)
        branches = Even(np.where(mask, _VALUE, _NULL).astype(np.uint8), 1, 1)
        inner = self._inner.pieces(level, Presence(mask, nulls))
        return [where(presence.mask, branches), *inner]


_NODES: dict[str, type[_Required]] = {
    "int": Integers,
    "long": Integers,
    "float": Fractions,
    "double": Fractions,
    "boolean": Booleans,
    "string": Texts,
    "bytes": Blobs,
    "fixed": Blobs,
    "enum": Symbols,
    "record": Records,
    "array": Arrays,
}
