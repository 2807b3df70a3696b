"""Avro's zigzag variable-length integers, a column at a time.

A varint holds seven bits a byte, lowest first, with the high bit set on all but the last byte. A
64-bit word takes 56 bits as eight such bytes, so three shift-and-mask steps spread a whole column.
"""

from __future__ import annotations

from bisect import bisect_right

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]
Bytes = npt.NDArray[np.uint8]

WORD_BYTES = 8
_WORD_BITS = 56
_LIMITS = [1 << 7 * size for size in range(1, 10)]
# (bits that stay, bits that move, by how much): halves of 28, then of 14, then of 7 bits.
_SPREAD = [
    (np.uint64(0x000000000FFFFFFF), np.uint64(0x00FFFFFFF0000000), np.uint64(4)),
    (np.uint64(0x00003FFF00003FFF), np.uint64(0x0FFFC0000FFFC000), np.uint64(2)),
    (np.uint64(0x007F007F007F007F), np.uint64(0x3F803F803F803F80), np.uint64(1)),
]


def _continuations() -> Words:
    """For each length 0..10, the high bits of its first and second word."""
    high = 0x80808080808080808080
    bits = [high & ((1 << 8 * max(size - 1, 0)) - 1) for size in range(11)]
    return np.array([[both & (1 << 64) - 1, both >> 64] for both in bits], dtype=np.uint64)


_CONTINUED = _continuations()


def zigzag(values: Ints) -> Words:
    """Small magnitudes of either sign as small unsigned numbers."""
    mapped: Words = ((values << 1) ^ (values >> 63)).view(np.uint64)
    return mapped


def varints(values: Ints) -> tuple[Bytes, int, Ints]:
    """The varints of `values`, which must not be empty: bytes, stride and lengths.

    The varint of value i is `lengths[i]` bytes from `i * stride`; the stride is 8 or 16.
    """
    unsigned = zigzag(values)
    lowest, highest = unsigned.min(), unsigned.max()
    shortest, longest = (bisect_right(_LIMITS, int(bound)) for bound in (lowest, highest))
    lengths = np.full(len(values), shortest + 1, dtype=np.int64)
    for limit in _LIMITS[shortest:longest]:
        lengths += unsigned >= np.uint64(limit)
    if int(highest) >> _WORD_BITS == 0:
        words = _spread(unsigned)
        words |= _CONTINUED[lengths, 0]
        return words.view(np.uint8), WORD_BYTES, lengths
    pairs = np.empty((len(values), 2), dtype=np.uint64)
    pairs[:, 0] = _spread(unsigned & np.uint64((1 << _WORD_BITS) - 1))
    pairs[:, 1] = _spread(unsigned >> np.uint64(_WORD_BITS))
    pairs |= _CONTINUED[lengths]
    return pairs.reshape(-1).view(np.uint8), 2 * WORD_BYTES, lengths


def _spread(numbers: Words) -> Words:
    """Numbers below 2**56 with seven bits in each byte, little-endian."""
    for stay, move, by in _SPREAD:
        numbers = (numbers & stay) | ((numbers & move) << by)
    return numbers.astype("<u8", copy=False)
