"""Members of `unique` meters: which values were seen, as 64-bit hashes.

A member is (tenant, meter, hour, hash). Sets merge by union, so a value seen in many batches, hours
or partitions of a month counts once. With a million members a month the chance that any two share a
hash is about 3 in 10**8, and the tenant pays for one less.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import polars as pl

from services.billing.domain.plans import Meter
from services.billing.domain.rows import matching_rows

MEMBER_SCHEMA = pl.Schema(
    {"tenant_id": pl.String(), "meter": pl.String(), "hour_us": pl.Int64(), "hash64": pl.Int64()}
)
"""A member's columns; `hash64` is `hash_texts`, as the signed integer that SQL can hold."""

_WORD = 8
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_MIX = (
    (np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)),
    (np.uint64(27), np.uint64(0x94D049BB133111EB)),
)


def meter_members(meter: Meter, frame: pl.DataFrame) -> pl.DataFrame:
    """The members that one batch shows: MEMBER_SCHEMA, distinct and sorted.

    `meter` is a `unique` one. Raises what `meter_batch` raises for the same rows.
    """
    positions = pl.int_range(frame.height, eager=True)
    rows = matching_rows(meter, frame, positions).unique(["tenant_id", "hour_us", "value"])
    return _distinct(
        rows.select(
            "tenant_id",
            pl.lit(meter.name).alias("meter"),
            "hour_us",
            pl.Series("hash64", hash_texts(rows["value"])),
        )
    )


def merge_members(a: pl.DataFrame, b: pl.DataFrame) -> pl.DataFrame:
    """The union of two sets of members, sorted."""
    return _distinct(pl.concat([a, b]))


def hash_texts(texts: pl.Series) -> npt.NDArray[np.int64]:
    """A hash of each text's UTF-8 bytes: int64, the same on every machine and in every version.

    Members are stored for months, and polars promises its own hash for one version only. This one
    starts from the length and folds in 8 bytes at a time (little-endian, padded with zeros), each
    followed by the finaliser of SplitMix64 (Steele, Lea and Flood, 2014).
    """
    octets = texts.cast(pl.Binary)
    lengths = octets.bin.size().to_numpy()
    state = _mixed(lengths.astype(np.uint64) * _MULTIPLIER)
    for start in range(0, int(lengths.max(initial=0)), _WORD):
        rows = np.flatnonzero(lengths > start)
        state[rows] = _mixed((state[rows] ^ _words(octets.gather(rows), start)) + _MULTIPLIER)
    return state.view(np.int64)


def _words(octets: pl.Series, start: int) -> npt.NDArray[np.uint64]:
    word = pl.col("octets").bin.slice(start, _WORD) + pl.lit(bytes(_WORD))
    padded = word.bin.slice(0, _WORD).bin.reinterpret(dtype=pl.UInt64, endianness="little")
    return octets.to_frame("octets").select(padded).to_series().to_numpy()


def _mixed(state: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    for shift, multiplier in _MIX:
        state = (state ^ (state >> shift)) * multiplier
    return state ^ (state >> np.uint64(31))


def _distinct(members: pl.DataFrame) -> pl.DataFrame:
    return members.unique().sort(MEMBER_SCHEMA.names())
