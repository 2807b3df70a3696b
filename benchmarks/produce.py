"""How fast records get into Kafka: one by one, by prebuilt batches, and by librdkafka.

usage: python benchmarks/produce.py [--records 300000] [--bytes 150]

Starts the embedded Kafka in .causemesh-benchmark. librdkafka is measured when `confluent-kafka` is
installed (it is no dependency of Causemesh).
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import time
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from aiokafka import AIOKafkaProducer

from causemesh.bus.base import Outbound
from causemesh.bus.kafka import KafkaBus
from causemesh.catalogue import Catalogue, Topic
from causemesh.local import Cluster

PARTITIONS = 4
UNIT = 5_000
Send = Callable[[str, list[bytes]], Awaitable[None]]


def topic_named(name: str) -> Topic:
    """A topic like predictions."""
    like = Catalogue.load().topic("inference.predictions.v1")
    return Topic(**{**vars(like), "name": name, "partitions": PARTITIONS})


async def one_by_one(bootstrap: str, topic: str, values: list[bytes]) -> None:
    """aiokafka's send, a future a record."""
    producer: Any = AIOKafkaProducer(
        bootstrap_servers=bootstrap, enable_idempotence=True, compression_type="lz4", linger_ms=5
    )
    await producer.start()
    for start in range(0, len(values), UNIT):
        part = enumerate(values[start : start + UNIT])
        sent = [await producer.send(topic, value, partition=n % PARTITIONS) for n, value in part]
        await asyncio.gather(*sent)
    await producer.stop()


async def prebuilt(bootstrap: str, topic: str, values: list[bytes]) -> None:
    """The mesh's producer: a batch a partition and unit."""
    producer = KafkaBus(bootstrap).producer("benchmark")
    for start in range(0, len(values), UNIT):
        unit = values[start : start + UNIT]
        parts = [unit[number::PARTITIONS] for number in range(PARTITIONS)]
        await producer.send(
            [Outbound(topic, n, [None] * len(part), part) for n, part in enumerate(parts)]
        )
    await producer.close()


async def librdkafka(bootstrap: str, topic: str, values: list[bytes]) -> None:
    """confluent-kafka, flushed once a unit as the cause protocol asks."""
    from confluent_kafka import Producer  # type: ignore[import-not-found]  # noqa: PLC0415

    settings = {"bootstrap.servers": bootstrap, "enable.idempotence": True, "linger.ms": 5}
    producer = Producer({**settings, "compression.type": "lz4"})
    for start in range(0, len(values), UNIT):
        for number, value in enumerate(values[start : start + UNIT]):
            producer.produce(topic, value, partition=number % PARTITIONS)
        producer.flush()


async def measure(bootstrap: str, count: int, size: int) -> None:
    """Print records/s of each way, units of 5,000 acknowledged before the next."""
    value = (b"0123456789abcdef" * (size // 16 + 1))[:size]
    values = [value] * count
    ways = {"aiokafka send": one_by_one, "prebuilt batches": prebuilt}
    if importlib.util.find_spec("confluent_kafka"):
        ways["librdkafka"] = librdkafka
    admin = KafkaBus(bootstrap).admin()
    for name, way in ways.items():
        topic = topic_named(f"benchmark.{uuid.uuid4().hex}")
        await admin.ensure([topic])
        await way(bootstrap, topic.name, values[:UNIT])
        began, cpu = time.perf_counter(), time.process_time()
        await way(bootstrap, topic.name, values)
        took, spent = time.perf_counter() - began, time.process_time() - cpu
        print(f"{name:18}{count / took:>12,.0f} records/s{count / spent:>12,.0f} a CPU second")
    await admin.close()


def main() -> None:
    """Start Kafka, measure, stop."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=300_000)
    parser.add_argument("--bytes", type=int, default=150)
    told = parser.parse_args()
    cluster = Cluster(Path(".causemesh-benchmark"), ("kafka",))
    endpoints = cluster.up()
    try:
        asyncio.run(measure(endpoints.kafka_bootstrap, told.records, told.bytes))
    finally:
        cluster.down()


if __name__ == "__main__":
    main()
