"""Keys go where other Kafka clients put them."""

from __future__ import annotations

import random

from aiokafka.partitioner import murmur2 as reference

from causemesh.bus.partitioner import murmur2, partitions_of


def test_murmur2_equals_another_client() -> None:
    rng = random.Random(1)
    keys = [rng.randbytes(rng.randrange(40)) for _ in range(2000)]
    assert murmur2(keys).tolist() == [reference(key) & 0xFFFFFFFF for key in keys]
    assert [murmur2([key]).item() for key in keys] == murmur2(keys).tolist()  # few go one by one


def test_null_keys_stay_on_the_given_partition() -> None:
    assert partitions_of([None, b"a", None], 4, unkeyed=6).tolist()[::2] == [2, 2]
