"""The schema ids of many values at once."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from causemesh.codec.wire import FOREIGN, HEADER_BYTES, header, schema_ids

_FRAMED = st.builds(
    lambda number, body: header(number) + body, st.integers(0, 2**32 - 1), st.binary(max_size=3)
)
_ANY = st.one_of(st.none(), st.binary(max_size=7), _FRAMED)


def one(value: bytes | None) -> int:
    if value is None or len(value) < HEADER_BYTES or value[0] != 0:
        return FOREIGN
    return int.from_bytes(value[1:HEADER_BYTES], "big")


@given(st.one_of(st.lists(_FRAMED, max_size=20), st.lists(_ANY, max_size=20)))
def test_ids_are_those_of_each_value_alone(values: Sequence[bytes | None]) -> None:
    assert schema_ids(values).tolist() == [one(value) for value in values]


def test_a_short_value_does_not_borrow_from_the_next() -> None:
    assert schema_ids([b"\0\0", header(7), header(8)]).tolist() == [FOREIGN, 7, 8]
