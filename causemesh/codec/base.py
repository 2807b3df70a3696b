"""What the runner asks of a codec; `decode.py` and `encode.py` are the real one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import polars as pl

from causemesh.bus.base import RawBatch


@dataclass(frozen=True)
class Decoded:
    """Values of one batch as columns.

    `frame` holds the good rows in input order and `rows[i]` the input row of frame row i. `bad`
    maps input rows to reasons. `foreign` maps the full name of another record (a control record)
    to its input rows. `writers` are the schema ids that the values were framed with.
    """

    frame: pl.DataFrame
    rows: npt.NDArray[np.int64]
    bad: Mapping[int, str] = field(default_factory=dict)
    foreign: Mapping[str, list[int]] = field(default_factory=dict)
    writers: frozenset[int] = frozenset()


class BatchDecoder(Protocol):
    """Framed values to columns."""

    async def decode(self, values: Sequence[bytes | None], reader: Mapping[str, Any]) -> Decoded:
        """Decode to the reader schema; never raises for what a value holds."""

    async def decode_log(self, raw: RawBatch, reader: Mapping[str, Any]) -> Decoded:
        """The same for records that only the mesh's own services write: faster, but a body that was
        forged could pass for several."""


class BatchEncoder(Protocol):
    """Columns to framed values."""

    def encode(self, frame: pl.DataFrame) -> list[bytes]:
        """One framed value a row; raises ValueError naming column and row."""


class EncoderFactory(Protocol):
    """Makes the encoder of a record."""

    async def encoder(self, subject: str, schema: Mapping[str, Any]) -> BatchEncoder:
        """The encoder for `schema` under the id that the registry gave `subject`."""
