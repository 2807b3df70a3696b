"""Framed values to columns: several writer schemas in one batch, bad records isolated."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import fastavro
import numpy as np
import polars as pl

from causemesh.bus.base import LogBlock, RawBatch
from causemesh.codec.base import Decoded
from causemesh.codec.block import BlockReader
from causemesh.codec.columns import NotExpressibleError, frame_schema, resolve, shape
from causemesh.codec.log_block import Form, LogBlockReader, form_of
from causemesh.codec.registry import Registry, UnknownSchema
from causemesh.codec.wire import FOREIGN, HEADER_BYTES, schema_ids
from causemesh.errors import Misdeclared
from causemesh.schemas import check_record

MAX_VALUE_BYTES = 1 << 20
_ONE_BY_ONE = 16
_FEW = 16  # so few records decode sooner one by one than as a block (measured)
_RESTARTS = 8


class Decoder:
    """Decodes batches by the registry's writer schemas."""

    def __init__(self, registry: Registry, *, max_value_bytes: int = MAX_VALUE_BYTES) -> None:
        self._registry = registry
        self._max_value_bytes = max_value_bytes
        self._writers: dict[int, _Writer] = {}
        # By identity, with the schema kept so that its id stays its own.
        self._empty: dict[int, tuple[Mapping[str, Any], pl.DataFrame]] = {}

    async def decode(self, values: Sequence[bytes | None], reader: Mapping[str, Any]) -> Decoded:
        """See `BatchDecoder.decode`."""
        name, values = full_name(reader), list(values)  # a lazy column finds each by a search
        frames: list[pl.DataFrame] = []
        rows: list[np.ndarray[Any, Any]] = []
        bad: dict[int, str] = {}
        foreign: dict[str, list[int]] = {}
        ids = schema_ids(values)
        met = np.unique(ids).tolist()
        writers = frozenset(met) - {FOREIGN}
        for schema_id in met:
            members = np.flatnonzero(ids == schema_id)
            writer = await self._writer(schema_id)
            if isinstance(writer, str):
                bad |= dict.fromkeys(members.tolist(), writer)
                continue
            if writer.name != name:
                foreign[writer.name] = sorted([*foreign.get(writer.name, ()), *members.tolist()])
                continue
            chosen = [values[row] or b"" for row in members.tolist()]
            fits, kept, oversize = self._split_by_size(chosen, members)
            bad |= oversize
            frame, good, wrong = writer.read(kept, reader)
            frames.append(frame)
            rows.append(fits[good])
            bad |= {int(fits[row]): reason for row, reason in wrong.items()}
        if not frames:
            nobody = np.empty(0, dtype=np.int64)
            return Decoded(self._nothing(reader), nobody, bad, foreign, writers)
        return Decoded(*_in_order(frames, rows), bad, foreign, writers)

    async def decode_log(self, raw: RawBatch, reader: Mapping[str, Any]) -> Decoded:
        """See `BatchDecoder.decode_log`."""
        if not raw.blocks:
            return await self.decode(raw.values, reader)
        frames: list[pl.DataFrame] = []
        rows: list[np.ndarray[Any, Any]] = []
        left: list[np.ndarray[Any, Any]] = []  # rows of blocks that are not read as such
        values: list[bytes | None] = []
        writers: set[int] = set()
        at = 0
        for block in raw.blocks:
            numbers = np.arange(at, at + len(block), dtype=np.int64)
            at += len(block)
            read = await self._block(block, reader) if len(block) > _FEW else None
            if read is None:
                left.append(numbers)
                values.extend(block.values)
            else:
                writers.add(read[0])
                frames.append(read[1])
                rows.append(numbers)
        if not left:
            return Decoded(*_in_order(frames, rows), writers=frozenset(writers))
        rest, numbers = await self.decode(values, reader), np.concatenate(left)
        if len(rest.rows) or not frames:
            frames.append(rest.frame)
            rows.append(numbers[rest.rows])
        bad = {int(numbers[row]): reason for row, reason in rest.bad.items()}
        foreign = {name: numbers[found].tolist() for name, found in rest.foreign.items()}
        return Decoded(*_in_order(frames, rows), bad, foreign, rest.writers | writers)

    async def _block(
        self, block: LogBlock, reader: Mapping[str, Any]
    ) -> tuple[int, pl.DataFrame] | None:
        """All records of a block, when they are the reader's, of one writer's schema (whose id is
        told) and nothing is wrong with any."""
        payload = block.payload
        form = form_of(payload) if payload is not None else None
        if payload is None or form is None:
            return None
        writer = await self._writer(form.schema_id)
        if isinstance(writer, str) or writer.name != full_name(reader):
            return None
        frame = writer.log_block(block, payload, form, reader, self._max_value_bytes)
        return None if frame is None else (form.schema_id, frame)

    def _nothing(self, reader: Mapping[str, Any]) -> pl.DataFrame:
        """The columns without rows: what every batch of control records comes to."""
        kept = self._empty.get(id(reader))
        if kept is None:
            kept = self._empty[id(reader)] = (reader, pl.DataFrame(schema=frame_schema(reader)))
        return kept[1]

    def _split_by_size(
        self, values: list[bytes], members: np.ndarray[Any, Any]
    ) -> tuple[np.ndarray[Any, Any], list[bytes], dict[int, str]]:
        """Rows and values that are small enough, and the reasons of the others."""
        sizes = np.fromiter(map(len, values), np.int64, len(values))
        over = sizes > self._max_value_bytes
        if not over.any():
            return members, values, {}
        reasons = {
            int(row): f"oversize: {size} bytes, at most {self._max_value_bytes}"
            for row, size in zip(members[over], sizes[over], strict=True)
        }
        kept = [value for value, large in zip(values, over.tolist(), strict=True) if not large]
        return members[~over], kept, reasons

    async def _writer(self, schema_id: int) -> _Writer | str:
        """The writer of an id, or the reason why its records are bad."""
        if schema_id == FOREIGN:
            return "not framed: a value starts with a zero byte and a four-byte schema id"
        writer = self._writers.get(schema_id)
        if writer is None:
            try:
                schema = await self._registry.schema(schema_id)
                check_record(schema, columnar=False)
            except UnknownSchema as error:
                return str(error)
            except Misdeclared as error:
                return f"schema id {schema_id} is refused: {error}"
            writer = self._writers[schema_id] = _Writer(schema)
        return writer


def full_name(schema: Mapping[str, Any]) -> str:
    """Namespace and name of a record."""
    namespace = schema.get("namespace")
    return f"{namespace}.{schema['name']}" if namespace else str(schema["name"])


def _in_order(
    frames: list[pl.DataFrame], rows: list[np.ndarray[Any, Any]]
) -> tuple[pl.DataFrame, np.ndarray[Any, Any]]:
    if len(frames) == 1:
        return frames[0], rows[0]
    joined = np.concatenate(rows)
    if (np.diff(joined) > 0).all():
        return pl.concat(frames), joined
    order = np.argsort(joined, kind="stable")
    return pl.concat(frames)[order], joined[order]


class _Writer:
    """One writer schema: by block where it is columnar, else record by record."""

    def __init__(self, schema: dict[str, Any]) -> None:
        self.schema = schema
        self.name = full_name(schema)
        try:
            check_record(schema, columnar=True)
            self._block: BlockReader | None = BlockReader(schema)
        except Misdeclared:
            self._block = None
        self._parsed = fastavro.parse_schema(plain(schema))
        self._log_blocks: dict[Form, LogBlockReader] = {}
        self._readers: dict[str, Any] = {}
        # By identity: comparing schemas by shape costs more than decoding a record.
        self._latest: tuple[Mapping[str, Any], Any, pl.Schema] | None = None

    def read(
        self, values: Sequence[bytes], reader: Mapping[str, Any]
    ) -> tuple[pl.DataFrame, list[int], dict[int, str]]:
        """Frame of good rows, their numbers, and reasons of the others."""
        bodies = [value[HEADER_BYTES:] for value in values]
        run = _Run(self, bodies, reader)
        if len(bodies) <= _FEW:
            run.singly(0, len(bodies))
        else:
            run.blocks(0, len(bodies), _RESTARTS)
        frames = run.frames or [pl.DataFrame(schema=frame_schema(reader))]
        return frames[0] if len(frames) == 1 else pl.concat(frames), run.good, run.bad

    def block(self, bodies: Sequence[bytes], reader: Mapping[str, Any]) -> tuple[Any, int] | None:
        """Leading good rows by column; None when this block must be split."""
        read = self._block.read(bodies) if self._block is not None else None
        if read is None:
            return None
        try:
            return resolve(read[0], self.schema, reader), read[1]
        except (NotExpressibleError, pl.exceptions.PolarsError):
            return None

    def log_block(
        self,
        block: LogBlock,
        payload: bytes,
        form: Form,
        reader: Mapping[str, Any],
        max_value_bytes: int,
    ) -> pl.DataFrame | None:
        """A block of the log by column; None when it must be read record by record."""
        if self._block is None:
            return None
        known = self._log_blocks.get(form)
        if known is None:
            known = self._log_blocks[form] = LogBlockReader(self.schema, form)
        frame = known.read(block, payload, max_value_bytes)
        try:
            return None if frame is None else resolve(frame, self.schema, reader)
        except (NotExpressibleError, pl.exceptions.PolarsError):
            return None

    def parsed_reader(self, reader: Mapping[str, Any]) -> tuple[Any, pl.Schema]:
        """The reader schema as `one` takes it, and its columns."""
        known = self._latest
        if known is None or known[0] is not reader:
            key = shape(dict(reader))
            parsed = self._readers.get(key)
            if parsed is None:
                parsed = self._readers[key] = fastavro.parse_schema(plain(dict(reader)))
            known = self._latest = (reader, parsed, frame_schema(reader))
        return known[1:]

    def one(self, body: bytes, parsed: Any) -> dict[str, Any]:
        """One record, by a parsed reader schema. Raises ValueError with the reason."""
        stream = io.BytesIO(body)
        try:
            row: Any = fastavro.schemaless_reader(stream, self._parsed, parsed)
        except Exception as error:
            raise ValueError(f"does not decode as {self.name}: {error!r}"[:300]) from error
        left = len(body) - stream.tell()
        if left:
            raise ValueError(f"does not decode as {self.name}: {left} bytes are left over")
        return dict(row)


class _Run:
    """Decodes one list of bodies, splitting around bad ones."""

    def __init__(self, writer: _Writer, bodies: Sequence[bytes], reader: Mapping[str, Any]) -> None:
        self._writer = writer
        self._bodies = bodies
        self._reader = reader
        self.frames: list[pl.DataFrame] = []
        self.good: list[int] = []
        self.bad: dict[int, str] = {}

    def blocks(self, start: int, end: int, restarts: int) -> None:
        """Decode [start, end): as a block, then around each bad body; at last one by one."""
        while start < end:
            if (end - start == 1 and restarts < _RESTARTS) or restarts <= 0:
                self.singly(start, end)
                return
            read = self._writer.block(self._bodies[start:end], self._reader)
            if read is None:
                if end - start <= _ONE_BY_ONE or self._writer._block is None:
                    self.singly(start, end)
                    return
                middle = (start + end) // 2
                self.blocks(start, middle, restarts - 1)
                self.blocks(middle, end, restarts - 1)
                return
            frame, good = read
            self.frames.append(frame)
            self.good.extend(range(start, start + good))
            start += good
            if start < end:
                self.singly(start, start + 1)
                start += 1
                restarts -= 1

    def singly(self, start: int, end: int) -> None:
        """Decode [start, end) record by record."""
        rows = []
        parsed, schema = self._writer.parsed_reader(self._reader)
        for number in range(start, end):
            try:
                rows.append(self._writer.one(self._bodies[number], parsed))
                self.good.append(number)
            except ValueError as error:
                self.bad[number] = str(error)
        if rows:
            self.frames.append(pl.DataFrame(rows, schema=schema, orient="row"))


def plain(schema: Any) -> Any:
    """The schema without uuid logical types: columns hold them as strings."""
    if isinstance(schema, list):
        return [plain(branch) for branch in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {
        key: value
        for key, value in schema.items()
        if not (key == "logicalType" and value == "uuid")
    }
    return {
        key: plain(value) if key in ("type", "items", "values") else _fields(key, value)
        for key, value in kept.items()
    }


def _fields(key: str, value: Any) -> Any:
    return [plain(field) for field in value] if key == "fields" else value
