"""Reading Kafka: partitions assigned by hand, positions kept by the caller, nothing committed.

One request is under way to every broker that leads a partition of ours, and names all of them. The
next goes out when what came was taken: so no partition waits for another one's request to end, and
reading runs beside the work. Connections, versions and who leads what are aiokafka's.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import structlog
from aiokafka import TopicPartition as KafkaPartition
from aiokafka.client import AIOKafkaClient
from aiokafka.errors import KafkaError, for_code

from causemesh.bus.base import BEFORE_FIRST, RawBatch, TopicPartition
from causemesh.bus.kafka_clients import started
from causemesh.bus.kafka_fetch import Fetched, FetchSession, earliest, fetched, told_earliest
from causemesh.bus.record_blocks import LogBatch, RecordBlock, blocks
from causemesh.errors import Gone, Retryable

_LONG_POLL_S = 0.5
_AGAIN_S = 0.1
_OUT_OF_RANGE = 1
_OTHER_LEADER = frozenset({3, 5, 6, 9, 74, 75, 76})  # of Kafka's error codes: ask for metadata
_log = structlog.get_logger(__name__)


class KafkaReader:
    """See `Reader`."""

    def __init__(self, bootstrap: str, after: Mapping[TopicPartition, int]) -> None:
        self._bootstrap = bootstrap
        self._next: dict[TopicPartition, int] = {key: at + 1 for key, at in after.items()}
        self._partitions = {key: KafkaPartition(*key) for key in after}
        self._fresh = {key for key, at in after.items() if at == BEFORE_FIRST}
        self._ends: dict[TopicPartition, int] = {}  # as the last answer with records told
        self._waiting: dict[TopicPartition, deque[RecordBlock]] = {}
        self._waiter: asyncio.Future[None] | None = None
        self._taken = asyncio.Event()
        self._moved = asyncio.Event()
        self._error: Exception | None = None
        self._client: Any = None
        self._leading: asyncio.Task[None] | None = None
        self._polls: dict[int, asyncio.Task[None]] = {}

    async def fetch(self, max_records: int, max_wait_s: float) -> list[RawBatch]:
        """See `Reader.fetch`. Raises Gone when the log no longer holds the position asked for."""
        if self._client is None:
            self._client = await self._open()
            self._leading = asyncio.create_task(self._follow_leaders())
        if not self._waiting and self._error is None and max_wait_s > 0:
            await self._wait(max_wait_s)
        if self._error is not None:
            raise self._error
        taken = [self._take(source, max_records) for source in list(self._waiting)]
        if not self._waiting:
            self._taken.set()
        return taken

    async def _wait(self, at_most_s: float) -> None:
        """Until something has come."""
        loop = asyncio.get_running_loop()
        self._waiter = loop.create_future()
        timer = loop.call_later(at_most_s, self._wake)
        try:
            await self._waiter
        finally:
            timer.cancel()
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _take(self, source: TopicPartition, most: int) -> RawBatch:
        """About `most` records of a partition, in whole blocks: the records of one that is cut are
        read one by one, so only a block that is more than that alone is cut."""
        queue, parts, left = self._waiting[source], list[RecordBlock](), most
        while queue and left > 0:
            block = queue.popleft()
            if len(block) > most:
                block, rest = block.split(left)
                queue.appendleft(rest)
            parts.append(block)
            left -= len(block)
        if not queue:
            del self._waiting[source]
        more = bool(queue) or self._next[source] < self._ends.get(source, 0)
        return LogBatch(*source, parts, more=more)

    async def _open(self) -> Any:
        client = AIOKafkaClient(bootstrap_servers=self._bootstrap)
        await started(SimpleNamespace(start=client.bootstrap), client.close)
        client.set_topics({topic for topic, _ in self._next})
        return client

    async def _follow_leaders(self) -> None:
        """Keep one poll running for every broker that leads a partition."""
        try:
            while True:
                self._moved.clear()
                leaders = [self._leader(source) for source in self._next]
                for node in {node for node in leaders if node is not None}:
                    if node not in self._polls or self._polls[node].done():
                        self._polls[node] = asyncio.create_task(self._poll(node))
                if None not in leaders:
                    await self._moved.wait()
                await self._client.force_metadata_update()
                await asyncio.sleep(_AGAIN_S)
        except Exception as error:  # noqa: BLE001 - told to who fetches
            self._tell(error)

    def _leader(self, source: TopicPartition) -> int | None:
        node: int | None = self._client.cluster.leader_for_partition(self._partitions[source])
        return None if node is None or node < 0 else node

    async def _poll(self, node: int) -> None:
        """Ask one broker, again and again, for what it leads; ends when that is nothing."""
        session, leads, failing = FetchSession(), 0, False
        try:
            while mine := [source for source in self._next if self._leader(source) == node]:
                if len(mine) < leads:
                    self._moved.set()
                leads = len(mine)
                await self._taken_up()
                wanted = {source: self._next[source] for source in mine}
                try:
                    response = await self._client.send(node, session.request(wanted, _LONG_POLL_S))
                except KafkaError as error:
                    if not failing:
                        _log.warning("broker_is_away", node=node, reason=repr(error))
                    failing = True
                    session.reset()
                    self._moved.set()
                    await asyncio.sleep(_AGAIN_S)
                    continue
                failing = False
                refused = session.accept(response)
                for one in fetched(response.topics) if not refused else ():
                    await self._hear(node, one)
                if refused or self._moved.is_set():
                    await asyncio.sleep(_AGAIN_S)
            self._moved.set()
        except Exception as error:  # noqa: BLE001 - told to who fetches
            self._tell(error)

    async def _taken_up(self) -> None:
        while self._waiting:
            self._taken.clear()
            await self._taken.wait()

    async def _hear(self, node: int, one: Fetched) -> None:
        source = one.source
        if one.error == _OUT_OF_RANGE and source in self._fresh:
            self._next[source] = await self._earliest(node, source)
        elif one.error == _OUT_OF_RANGE:
            self._tell(
                Gone(
                    f"the log of {source[0]}-{source[1]} no longer holds the stored position"
                    f" {self._next[source] - 1}; retention is shorter than the time this service"
                    " was away"
                )
            )
        elif one.error in _OTHER_LEADER:
            self._moved.set()
        elif one.error:
            self._tell(Retryable(f"reading {source[0]} failed: {for_code(one.error)()!r}"))
        elif one.records:
            self._receive(source, one.records)
            self._ends[source] = one.end

    def _receive(self, source: TopicPartition, records: bytes) -> None:
        for block in blocks(records, self._next[source]):
            self._next[source] = max(self._next[source], block.next_offset)
            if len(block) and not block.control:
                self._waiting.setdefault(source, deque()).append(block)
        self._fresh.discard(source)
        if self._waiting:
            self._wake()

    async def _earliest(self, node: int, source: TopicPartition) -> int:
        """Where the log begins now."""
        error, offset = told_earliest(await self._client.send(node, earliest(source)))
        if error:
            raise for_code(error)(f"where {source[0]}-{source[1]} begins")
        return offset

    def _tell(self, error: Exception) -> None:
        """Let the next fetch raise it."""
        if isinstance(error, KafkaError):
            error = Retryable(f"reading failed: {error!r}")
        self._error = self._error or error
        self._wake()

    async def close(self) -> None:
        """See `Reader.close`."""
        tasks = [*self._polls.values(), *([self._leading] if self._leading else [])]
        self._polls, self._leading = {}, None
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._client is not None:
            client, self._client = self._client, None
            await client.close()
