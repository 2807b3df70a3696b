"""Kafka through aiokafka.

Reading and membership use separate consumers. A reader has its partitions assigned by hand and
never commits; a member subscribes only to own partition numbers, keeps all of them paused and
commits offsets for lag dashboards. So a rebalance can't move a reader's position, and the position
store alone says where to begin.

See `kafka_reader` and `kafka_producer`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener
from aiokafka import TopicPartition as KafkaPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.coordinator.assignors.range import RangePartitionAssignor
from aiokafka.errors import KafkaError
from aiokafka.structs import OffsetAndMetadata

from causemesh.bus.base import TopicPartition
from causemesh.bus.kafka_clients import started
from causemesh.bus.kafka_producer import KafkaProducer
from causemesh.bus.kafka_reader import KafkaReader
from causemesh.catalogue import Topic
from causemesh.errors import Fatal, Misdeclared, Retryable

_KEEP_ALIVE_MS = 500
_KNOWN_ATTEMPTS, _KNOWN_WAIT_S = 50, 0.2
_METADATA_MS = 10_000  # how soon a member notices topics and partitions that changed
_ALREADY_EXISTS = 36


class KafkaBus:
    """A Kafka cluster; see `Bus`."""

    def __init__(
        self, bootstrap: str, *, session_timeout_ms: int = 6_000, replication: int = 1
    ) -> None:
        self._bootstrap = bootstrap
        self._session_timeout_ms = session_timeout_ms
        self._replication = replication

    def reader(self, after: Mapping[TopicPartition, int]) -> KafkaReader:
        """See `Bus.reader`."""
        return KafkaReader(self._bootstrap, after)

    def producer(self, name: str) -> KafkaProducer:
        """See `Bus.producer`."""
        return KafkaProducer(self._bootstrap, name)

    def membership(self, group: str, topics: Sequence[str]) -> KafkaMembership:
        """See `Bus.membership`."""
        return KafkaMembership(self._bootstrap, group, topics, self._session_timeout_ms)

    def admin(self) -> KafkaAdmin:
        """See `Bus.admin`."""
        return KafkaAdmin(self._bootstrap, self._replication)

    async def close(self) -> None:
        """Nothing is held."""


class KafkaMembership(ConsumerRebalanceListener):  # type: ignore[misc]
    """See `Membership`. The range assignor gives a member one partition number of every topic."""

    def __init__(
        self, bootstrap: str, group: str, topics: Sequence[str], session_timeout_ms: int
    ) -> None:
        self._topics = list(topics)
        self._assignments: asyncio.Queue[frozenset[int]] = asyncio.Queue()
        self._consumer: Any = AIOKafkaConsumer(
            bootstrap_servers=bootstrap,
            group_id=group,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            partition_assignment_strategy=(RangePartitionAssignor,),
            session_timeout_ms=session_timeout_ms,
            heartbeat_interval_ms=max(session_timeout_ms // 4, 100),
            metadata_max_age_ms=_METADATA_MS,
        )
        self._alive: asyncio.Task[None] | None = None

    async def changed(self) -> frozenset[int]:
        """See `Membership.changed`; empty while partitions are being moved."""
        if self._alive is None:
            await started(self._consumer)
            await self._until_known()
            self._consumer.subscribe(self._topics, listener=self)
            self._alive = asyncio.create_task(self._keep_alive())
        waiting = asyncio.create_task(self._assignments.get())
        done, _ = await asyncio.wait({waiting, self._alive}, return_when=asyncio.FIRST_COMPLETED)
        if waiting in done:
            return waiting.result()
        waiting.cancel()
        raise Retryable(f"the group was lost: {self._alive.exception()!r}")

    async def _until_known(self) -> None:
        """Wait for topics that were created a moment ago: a member that joins without knowing their
        partitions is assigned none of them. Raises Retryable when they don't come."""
        for _ in range(_KNOWN_ATTEMPTS):
            known = await self._consumer.topics()
            missing = sorted(set(self._topics) - known)
            if not missing:
                return
            await asyncio.sleep(_KNOWN_WAIT_S)
        raise Retryable(f"Kafka does not know {', '.join(missing)} (yet)")

    async def on_partitions_revoked(self, revoked: Any) -> None:
        """The group is being rebalanced: own nothing until it is done."""
        self._assignments.put_nowait(frozenset())

    async def on_partitions_assigned(self, assigned: Any) -> None:
        """Own these partition numbers; read nothing through the group."""
        self._consumer.pause(*assigned)
        self._assignments.put_nowait(frozenset(partition.partition for partition in assigned))

    async def _keep_alive(self) -> None:
        while True:
            await self._consumer.getmany(timeout_ms=_KEEP_ALIVE_MS)

    async def report(self, positions: Mapping[TopicPartition, int]) -> None:
        """See `Membership.report`. A rebalance in between makes the report moot, not wrong."""
        owned = self._consumer.assignment()
        offsets = {
            partition: OffsetAndMetadata(positions[key] + 1, "")
            for partition in owned
            if (key := (partition.topic, partition.partition)) in positions
        }
        if offsets:
            with suppress(KafkaError):
                await self._consumer.commit(offsets)

    async def close(self) -> None:
        """See `Membership.close`."""
        if self._alive is not None:
            self._alive.cancel()
            with suppress(asyncio.CancelledError):
                await self._alive
        await self._consumer.stop()


class KafkaAdmin:
    """See `Admin`; new topics get `replication` copies."""

    def __init__(self, bootstrap: str, replication: int) -> None:
        self._bootstrap = bootstrap
        self._replication = replication
        self._client: Any = None
        self._consumer: Any = None

    async def ensure(self, topics: Sequence[Topic]) -> list[str]:
        """See `Admin.ensure`."""
        client = await self._opened()
        with _retryable("asking for topics"):
            existing = set(await client.list_topics())
            described = await client.describe_topics([t.name for t in topics if t.name in existing])
        counts = {entry["topic"]: len(entry["partitions"]) for entry in described}
        missing = [topic for topic in topics if topic.name not in existing]
        for topic in topics:
            if counts.get(topic.name, topic.partitions) != topic.partitions:
                raise Misdeclared(
                    f"{topic.name} has {counts[topic.name]} partitions, the catalogue says"
                    f" {topic.partitions}; keys would move: create {topic.name} under a new version"
                )
        return await self._create(client, missing) if missing else []

    async def _create(self, client: Any, missing: Sequence[Topic]) -> list[str]:
        """The names created; not those that another process, or a late list, was behind on."""
        wanted = [
            NewTopic(
                topic.name,
                topic.partitions,
                self._replication,
                topic_configs=topic.broker_settings(),
            )
            for topic in missing
        ]
        with _retryable("creating topics"):
            answer = await client.create_topics(wanted)
        errors = {
            entry[0]: entry[1:]
            for entry in answer.topic_errors
            if entry[1] not in (0, _ALREADY_EXISTS)
        }
        if errors:
            raise Fatal(f"the broker refused to create topics: {errors}")
        return [entry[0] for entry in answer.topic_errors if entry[1] == 0]

    async def ends(self, topics: Sequence[str]) -> dict[TopicPartition, int]:
        """See `Admin.ends`. Raises Retryable for a topic that has no partitions (yet)."""
        client = await self._opened()
        with _retryable("asking for topics"):
            described = await client.describe_topics(list(topics))
        missing = [entry["topic"] for entry in described if not entry["partitions"]]
        if missing:
            raise Retryable(f"Kafka does not know {', '.join(sorted(missing))} (yet)")
        partitions = [
            KafkaPartition(entry["topic"], number)
            for entry in described
            for number in range(len(entry["partitions"]))
        ]
        if self._consumer is None:
            consumer = AIOKafkaConsumer(bootstrap_servers=self._bootstrap, group_id=None)
            await started(consumer)
            self._consumer = consumer
        with _retryable("asking for the ends of topics"):
            ends = await self._consumer.end_offsets(partitions)
        return {(key.topic, key.partition): offset - 1 for key, offset in ends.items()}

    async def reported(self, group: str) -> dict[TopicPartition, int]:
        """See `Admin.reported`."""
        client = await self._opened()
        with _retryable("asking for offsets"):
            offsets = await client.list_consumer_group_offsets(group)
        return {(key.topic, key.partition): at.offset - 1 for key, at in offsets.items()}

    async def _opened(self) -> Any:
        if self._client is None:
            client = AIOKafkaAdminClient(bootstrap_servers=self._bootstrap)
            await started(client, client.close)
            self._client = client
        return self._client

    async def close(self) -> None:
        """See `Admin.close`."""
        if self._client is not None:
            client, self._client = self._client, None
            await client.close()
        if self._consumer is not None:
            consumer, self._consumer = self._consumer, None
            await consumer.stop()


@contextmanager
def _retryable(doing: str) -> Iterator[None]:
    """An error of the client as one to wait for: an answer's own errors are read by the caller."""
    try:
        yield
    except KafkaError as error:
        raise Retryable(f"{doing}: Kafka is away: {error!r}", retry_after=1.0) from error
