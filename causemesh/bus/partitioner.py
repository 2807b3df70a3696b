"""Which partition a key belongs to: murmur2, as the Java client's default partitioner has it.

So a producer in any language that uses its client's default (`murmur2_random` in librdkafka) puts
a key where the mesh does, and co-partitioned topics stay so.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_SEED = np.uint32(0x9747B28C)
_M = np.uint32(0x5BD1E995)
_R = np.uint32(24)
_FEW_BYTES = 256  # so few are hashed sooner one by one than by columns (measured)


def _murmur2_block(block: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint32]:
    """Hash equal-length keys; `block` is uint8 [keys, length]."""
    count, length = block.shape
    words = length // 4
    hashed = np.full(count, _SEED ^ np.uint32(length), dtype=np.uint32)
    body = np.ascontiguousarray(block[:, : words * 4]).view("<u4").reshape(count, words)
    for word in range(words):
        k = body[:, word] * _M
        k ^= k >> _R
        k *= _M
        hashed *= _M
        hashed ^= k
    tail = block[:, words * 4 :]
    if tail.shape[1]:
        for byte in range(tail.shape[1]):
            hashed ^= tail[:, byte].astype(np.uint32) << np.uint32(8 * byte)
        hashed *= _M
    hashed ^= hashed >> np.uint32(13)
    hashed *= _M
    hashed ^= hashed >> np.uint32(15)
    return hashed


def _murmur2_one(key: bytes) -> int:
    length = len(key)
    whole = length & ~3
    hashed = 0x9747B28C ^ length
    for at in range(0, whole, 4):
        k = int.from_bytes(key[at : at + 4], "little") * 0x5BD1E995 & 0xFFFFFFFF
        k = (k ^ k >> 24) * 0x5BD1E995 & 0xFFFFFFFF
        hashed = hashed * 0x5BD1E995 & 0xFFFFFFFF ^ k
    if whole < length:
        hashed = (hashed ^ int.from_bytes(key[whole:], "little")) * 0x5BD1E995 & 0xFFFFFFFF
    hashed = (hashed ^ hashed >> 13) * 0x5BD1E995 & 0xFFFFFFFF
    return hashed ^ hashed >> 15


def murmur2(keys: Sequence[bytes]) -> npt.NDArray[np.uint32]:
    """The 32-bit murmur2 of each key (seed 0x9747b28c)."""
    if sum(map(len, keys)) <= _FEW_BYTES:
        return np.array([_murmur2_one(key) for key in keys], dtype=np.uint32)
    lengths = np.fromiter(map(len, keys), dtype=np.int64, count=len(keys))
    hashed = np.empty(len(keys), dtype=np.uint32)
    with np.errstate(over="ignore"):
        for length in np.unique(lengths):
            rows = np.flatnonzero(lengths == length)
            joined = b"".join([keys[row] for row in rows.tolist()])
            block = np.frombuffer(joined, dtype=np.uint8).reshape(len(rows), int(length))
            hashed[rows] = _murmur2_block(block)
    return hashed


def partitions_of(
    keys: Sequence[bytes | None], partitions: int, *, unkeyed: int
) -> npt.NDArray[np.int64]:
    """The partition of each key out of `partitions`; a null key goes to `unkeyed`."""
    if None not in keys:
        hashed = murmur2([key for key in keys if key is not None])
        return (hashed & np.uint32(0x7FFFFFFF)).astype(np.int64) % partitions
    chosen = np.full(len(keys), unkeyed % partitions, dtype=np.int64)
    keyed = [row for row, key in enumerate(keys) if key is not None]
    if keyed:
        present = [key for key in keys if key is not None]
        chosen[keyed] = (murmur2(present) & np.uint32(0x7FFFFFFF)).astype(np.int64) % partitions
    return chosen
