"""Faust's part: which partitions are ours, the tables out of their changelog, one agent each.

Faust acks an event whose agent raised, commits offsets of events that are still at work when
partitions move, and does so before the changelog is sure to be written. So nothing here rests on
its offsets: reading goes on behind the position that is stored with the tables. They are not even
committed, for when partitions are assigned Faust fetches from its own offset first.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import faust
import structlog
from faust.transport.drivers.aiokafka import Consumer as KafkaConsumer
from faust.transport.drivers.aiokafka import Transport as KafkaTransport
from faust.types import TP, EventT

from causemesh.catalogue import Catalogue
from causemesh.derived import Transform
from causemesh.errors import Fatal, Retryable
from services.features.transforms.rows import Row
from services.features.transforms.worker import GROUP, TransformWorker, raw_batch

_STOP_S = 10.0
_log = structlog.get_logger(__name__)
Unpack = Callable[[bytes], Row]
Position = Callable[[str, int], int | None]
"""The stored position of a feed's partition; None for another topic."""


class Rows(faust.Table[bytes, Row]):
    """A table whose changelog holds TransformRows, written by `TransformWorker`.

    Of two records of a key the higher sequence counts, not the later one: a process that was
    replaced while it was paused may have written an old row behind a new one.
    """

    unpack: Unpack
    fail: Callable[[Exception], None]

    def row(self, key: bytes) -> Row | None:
        """See `Store.row`."""
        found: Row | None = self.data.get(key)
        return found

    def put(self, partition: int, key: bytes, row: Row) -> None:
        """See `Store.put`."""
        data: Any = self.data
        data[key] = row
        data._key_partition[key] = partition  # what Faust forgets a lost partition by

    def apply_changelog_batch(self, batch: Iterable[EventT[Any]]) -> None:
        """Take over records of the changelog."""
        try:
            self._take(batch)
        except Exception as error:  # Faust would log it, and go on without the rows
            self.fail(error)
            raise

    def _take(self, batch: Iterable[EventT[Any]]) -> None:
        for event in batch:
            key, value = event.message.key, event.message.value
            if key is None or value is None:
                continue
            row, held = self.unpack(value), self.row(key)
            if held is None or row.sequence >= held.sequence:
                self.put(event.message.partition, key, row)


class _ReadOffsets(dict[TP, Any]):
    """How far Faust believes to have read; of a feed it knows nothing, and so drops nothing.

    It takes what comes from before for old, also where reading has gone back.
    """

    def __init__(self, is_feed: Callable[[TP], bool]) -> None:
        super().__init__()
        self._is_feed = is_feed

    def __getitem__(self, tp: TP) -> Any:
        return None if self._is_feed(tp) else self.get(tp)


class _Consumer(KafkaConsumer):
    """Goes on behind stored positions, whatever the group's offsets say."""

    def __init__(self, *given: Any, **settings: Any) -> None:
        super().__init__(*given, **settings)
        app: Any = self.app
        self._read_offset: Any = _ReadOffsets(
            lambda tp: app.position_of(tp.topic, tp.partition) is not None
        )

    async def perform_seek(self) -> None:
        """See Faust's."""
        await super().perform_seek()
        for tp in self.assignment():
            app: Any = self.app
            position = app.position_of(tp.topic, tp.partition)
            if position is not None:
                await self.seek(tp, position + 1)
                self._committed_offset[tp] = position + 1 or None

    async def _seek(self, partition: TP, offset: int) -> None:
        """In the thread that fetches: from another one it would take records out of its hands."""
        thread: Any = self._thread
        await thread.call_thread(thread.seek, partition, offset)

    async def _commit(self, offsets: Mapping[TP, int]) -> bool:
        """Faust may note them as committed; nobody reads them."""
        return True


class _Transport(KafkaTransport):
    Consumer = _Consumer


class TransformApp(faust.App):
    """The Faust app of all transforms."""

    position_of: Position


class Stream:
    """Runs the workers on what Faust fetches; `failed` is done once it can't go on."""

    def __init__(
        self,
        brokers: str,
        catalogue: Catalogue,
        *,
        folder: Path,
        session_timeout_s: float,
        batch: int,
        unpack: Unpack,
    ) -> None:
        self._catalogue = catalogue
        self._batch = batch
        self._unpack = unpack
        self._workers: dict[str, TransformWorker] = {}
        self._ready = False
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._app = TransformApp(
            GROUP,
            broker="kafka://" + ";".join(brokers.split(",")),
            store="memory://",
            Table=Rows,
            datadir=str(folder),
            web_enabled=False,
            autodiscover=False,
            # topics are made from the catalogue, and nobody leads
            topic_allow_declare=False,
            topic_disable_leader=True,
            reply_create_topic=False,
            table_standby_replicas=0,
            consumer_auto_offset_reset="earliest",
            broker_session_timeout=session_timeout_s,
            broker_heartbeat_interval=session_timeout_s / 3,
        )
        self._app.finalize()
        self._app.transport = _Transport(self._app.conf.broker_consumer, self._app)
        self._app.position_of = self._position

    def table(self, transform: Transform) -> Rows:
        """The table of a transform, empty until Faust has brought it back."""
        partitions = self._catalogue.topic(transform.state).partitions
        raw: dict[str, Any] = {
            "key_serializer": "raw",
            "value_serializer": "raw",
            "allow_empty": True,
        }
        changelog = self._app.topic(
            transform.state,
            partitions=partitions,
            compacting=True,
            acks=False,
            internal=True,
            **raw,
        )
        table: Any = self._app.Table(
            transform.name, partitions=partitions, changelog_topic=changelog
        )
        rows: Rows = table
        rows.unpack, rows.fail = self._unpack, self._fail
        return rows

    def add(self, worker: TransformWorker, table: Rows) -> None:
        """Serve a worker with what comes on its transform's feed."""
        transform = worker.transform
        self._workers[transform.feed] = worker
        feed = self._app.topic(transform.feed, key_serializer="raw", value_serializer="raw")

        async def recovered() -> None:
            worker.recovered()
            self._ready = True

        async def consume(stream: Any) -> None:
            await self._consume(worker, stream)

        table.on_recover(recovered)
        self._app.agent(feed, name=transform.name, concurrency=1)(consume)

    async def run(self) -> None:
        """Serve until cancelled. Raises Fatal when Faust ended, or what a worker failed with."""
        starting: asyncio.Future[Any] = asyncio.ensure_future(self._app.start())
        ended: asyncio.Future[Any] = asyncio.ensure_future(self._app.wait())
        over: set[asyncio.Future[Any]] = {self.failed, ended}
        try:
            await asyncio.wait({starting, *over}, return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                starting.result()
                await asyncio.wait(over, return_when=asyncio.FIRST_COMPLETED)
            if self.failed.done():
                self.failed.result()
            raise Fatal(f"Faust ended: {self._app.crash_reason!r}")
        finally:
            starting.cancel()
            ended.cancel()
            await self._stop()

    async def _stop(self) -> None:
        """Leave the group. What Faust can't end in time is ended with the process."""
        try:
            async with asyncio.timeout(_STOP_S):
                await self._app.stop()
        except Exception as error:  # noqa: BLE001 - why we stop is what counts
            _log.warning("faust_not_stopped", reason=repr(error))

    def missing(self) -> Mapping[str, str]:
        """What keeps the transforms from their work."""
        return {} if self._ready else {GROUP: "the tables are not brought back yet"}

    def _fail(self, error: Exception) -> None:
        if not self.failed.done():
            self.failed.set_exception(error)

    def _position(self, topic: str, partition: int) -> int | None:
        worker = self._workers.get(topic)
        return None if worker is None else worker.position(partition)

    async def _consume(self, worker: TransformWorker, stream: Any) -> None:
        """Never raises: Faust would ack what failed, and go on."""
        try:
            async for gathered in _gathered(stream, self._batch):
                # what was fetched before partitions moved comes again, from the stored position on
                now = self._app.consumer_generation_id
                messages = [one for one in gathered if one.generation_id == now]
                for partition in dict.fromkeys(one.partition for one in messages):
                    mine = [one for one in messages if one.partition == partition]
                    if worker.serves(partition):
                        run = await self._following(worker, partition, mine)
                        await self._work(worker, partition, run)
        except Exception as error:  # noqa: BLE001 - it ends the process
            _log.error("transform_failed", transform=worker.transform.name, reason=repr(error))
            self._fail(error)
            await asyncio.Event().wait()

    async def _following(
        self, worker: TransformWorker, number: int, messages: Sequence[Any]
    ) -> list[Any]:
        """The messages behind the stored position, each behind the one before it.

        What was fetched while partitions moved may be lost on its way to here: then reading goes
        back, and the messages come again. What was fetched before that comes first, and it may end
        in the list in which they begin: were they left out with it, each time would be as the last.
        """
        run: list[Any] = []
        tp = TP(worker.transform.feed, number)
        expected, lost = worker.position(number) + 1, False
        for one in messages:
            if one.offset < expected:
                continue
            lost = one.offset > expected and (
                lost or bool(run) or not await self._begins(tp, one.offset)
            )
            if not lost:
                run.append(one)
                expected = one.offset + 1
        if lost:
            _log.info("transform_goes_back", topic=tp.topic, partition=number, to=expected)
            await self._app.consumer.seek(tp, expected)
        return run

    async def _begins(self, tp: TP, offset: int) -> bool:
        """Whether the log begins there, because the broker deleted what was before."""
        earliest = await self._app.consumer.earliest_offsets(tp)
        return offset <= earliest.get(tp, 0)

    async def _work(self, worker: TransformWorker, number: int, messages: Sequence[Any]) -> None:
        raw = raw_batch(worker.transform.feed, number, messages)
        while True:
            try:
                await worker.work(raw)
                return
            except Retryable as error:  # the registry is away: nothing was sent or stored
                _log.warning("transform_waits", reason=str(error))
                await asyncio.sleep(error.retry_after)


async def _gathered(stream: Any, most: int) -> AsyncIterator[list[Any]]:
    """What has come already, as lists of messages."""
    waiting: list[Any] = []
    queue = stream.channel.queue
    async for event in stream.events():
        waiting.append(event.message)
        if len(waiting) >= most or queue.empty():
            yield waiting
            waiting = []
