"""Pulsar's HTTP admin API: topics, their ends, and who is in a group."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any
from urllib.parse import quote

import httpx
import pulsar  # type: ignore[import-untyped]
import structlog

from causemesh.bus.base import BEFORE_FIRST, TopicPartition
from causemesh.bus.pulsar_http import tls
from causemesh.bus.pulsar_ids import packed_one
from causemesh.bus.pulsar_retention import NOT_ALLOWED, check_namespace, minutes_of, policy
from causemesh.catalogue import Topic
from causemesh.errors import Fatal, Misdeclared, Retryable

_log = structlog.get_logger(__name__)
_NAMESPACE = "persistent/public/default"
_POLICIES = "namespaces/public/default"
_GROUPS = "causemesh.group."
_SUBSCRIPTION = "members"
_POLL_S = 0.25
_NO_CONTENT, _NOT_FOUND, _CONFLICT = 204, 404, 409


class PulsarAdmin:
    """See `Admin`."""

    def __init__(self, admin_url: str) -> None:
        base = f"{admin_url}/admin/v2/"
        self._http = httpx.AsyncClient(base_url=base, timeout=10.0, verify=tls())

    async def ask(
        self, method: str, path: str, body: Any = None, *, of: str = _NAMESPACE
    ) -> httpx.Response:
        """One call. Raises Retryable when Pulsar is away or in trouble."""
        try:
            answer = await self._http.request(method, f"{of}/{path}", json=body)
        except httpx.TransportError as error:
            raise Retryable(f"Pulsar is away: {error!r}", retry_after=1.0) from error
        if answer.status_code >= 500:
            raise Retryable(f"Pulsar could not answer {path}: {answer.text[:200]}")
        return answer

    async def partitions(self, topic: str) -> int:
        """How many partitions a topic has; 0 when it does not exist."""
        answer = await self.ask("GET", f"{quote(topic)}/partitions?checkAllowAutoCreation=false")
        if answer.status_code == _NOT_FOUND:
            return 0
        _expect(answer)
        return int(answer.json()["partitions"])

    async def create(self, topic: str, partitions: int) -> bool:
        """Create a partitioned topic; False when another process was first."""
        answer = await self.ask("PUT", f"{quote(topic)}/partitions", partitions)
        if answer.status_code == _CONFLICT:
            return False
        _expect(answer)
        return True

    async def ensure(self, topics: Sequence[Topic]) -> list[str]:
        """See `Admin.ensure`. Retention is set on topics that exist, too."""
        counts = await asyncio.gather(*(self.partitions(topic.name) for topic in topics))
        for topic, count in zip(topics, counts, strict=True):
            if count not in (0, topic.partitions):
                raise Misdeclared(
                    f"{topic.name} has {count} partitions, the catalogue says"
                    f" {topic.partitions}; keys would move: create {topic.name} under a new version"
                )
        missing = [topic for topic, count in zip(topics, counts, strict=True) if not count]
        made = [one.name for one in missing if await self.create(one.name, one.partitions)]
        await asyncio.gather(*(self._retain(topic) for topic in topics))
        return made

    async def _retain(self, topic: Topic) -> None:
        """Set how long a topic is kept. A broker without policies of topics keeps it as long as its
        namespace; raises Misdeclared when that is too short."""
        path, wanted = f"{quote(topic.name)}/retention", policy(minutes_of(topic))
        answer = await self.ask("GET", path)
        if answer.status_code == NOT_ALLOWED:
            space = await self.ask("GET", "retention", of=_POLICIES)
            _expect(space)
            check_namespace(space.json() if space.content else None, topic)
            return
        _expect(answer)
        if not answer.content or answer.json() != wanted:
            _expect(await self.ask("POST", path, wanted))

    async def ends(self, topics: Sequence[str]) -> dict[TopicPartition, int]:
        """See `Admin.ends`."""
        counts = await asyncio.gather(*(self.partitions(topic) for topic in topics))
        missing = [topic for topic, count in zip(topics, counts, strict=True) if not count]
        if missing:
            raise Retryable(f"Pulsar does not know {', '.join(sorted(missing))} (yet)")
        keys = [
            (topic, number)
            for topic, count in zip(topics, counts, strict=True)
            for number in range(count)
        ]
        ends = await asyncio.gather(*(self._end(*key) for key in keys))
        return dict(zip(keys, ends, strict=True))

    async def _end(self, topic: str, partition: int) -> int:
        answer = await self.ask("GET", f"{quote(topic)}-partition-{partition}/lastMessageId")
        if answer.status_code == _NOT_FOUND:
            raise Retryable(f"Pulsar does not know {topic}-partition-{partition} (yet)")
        _expect(answer)
        last = answer.json()
        if last["entryId"] < 0:
            return BEFORE_FIRST
        return packed_one(last["ledgerId"], last["entryId"], last.get("batchIndex", 0))

    async def reported(self, group: str) -> dict[TopicPartition, int]:
        """See `Admin.reported`."""
        count = await self.partitions(_GROUPS + group)
        told: dict[TopicPartition, int] = {}
        for number in range(count):
            answer = await self.ask("GET", _properties_of(group, number))
            if answer.status_code == _NOT_FOUND:
                continue  # nobody has joined at this partition yet
            _expect(answer)
            told |= {(topic, number): int(at) for topic, at in (answer.json() or {}).items()}
        return told

    async def report(self, group: str, positions: Mapping[TopicPartition, int]) -> None:
        """Write what `reported` reads."""
        by_number: dict[int, dict[str, str]] = {}
        for (topic, number), at in positions.items():
            by_number.setdefault(number, {})[topic] = str(at)
        for number, told in by_number.items():
            await self.ask("PUT", _properties_of(group, number), told)

    async def active(self, group: str, members: Mapping[int, str]) -> frozenset[int]:
        """The partition numbers whose active consumer is the member's own."""
        path = f"{quote(_GROUPS + group)}/partitioned-stats?perPartition=true"
        answer = await self.ask("GET", path)
        _expect(answer)
        owned = set()
        for name, stats in answer.json()["partitions"].items():
            number = int(name.rsplit("-", 1)[1])
            subscription = stats["subscriptions"].get(_SUBSCRIPTION, {})
            if members.get(number) == subscription.get("activeConsumerName", ""):
                owned.add(number)
        return frozenset(owned)

    async def close(self) -> None:
        """See `Admin.close`."""
        await self._http.aclose()


def _properties_of(group: str, number: int) -> str:
    return f"{quote(_GROUPS + group)}-partition-{number}/subscription/{_SUBSCRIPTION}/properties"


def _expect(answer: httpx.Response) -> None:
    if answer.status_code not in (200, _NO_CONTENT):
        asked = f"{answer.request.method} {answer.request.url.path}"
        raise Fatal(f"Pulsar refused {asked}: {answer.status_code} {answer.text[:200]}")


class PulsarMembership:
    """See `Membership`: a failover consumer on each partition of the group's own empty topic.

    The broker names one active consumer a partition, spread over the members, and another as soon
    as its connection ends. Asked about every `_POLL_S`.
    """

    def __init__(
        self, client: Callable[[], Any], admin_url: str, group: str, topics: Sequence[str]
    ) -> None:
        self._client = client
        self._admin = PulsarAdmin(admin_url)
        self._group = group
        self._topics = list(topics)
        self._name = uuid.uuid4().hex
        self._consumers: dict[int, Any] = {}
        self._owned: frozenset[int] | None = None
        self._told: dict[TopicPartition, int] = {}

    async def changed(self) -> frozenset[int]:
        """See `Membership.changed`."""
        while not self._consumers:
            try:
                await self._join()
            except Retryable as error:  # busy or away: that ends no service that waits to begin
                _log.warning("joining_again", group=self._group, reason=str(error))
                await asyncio.sleep(error.retry_after)
        while True:
            members = dict.fromkeys(self._consumers, self._name)
            # While the broker is away all stays as it was: the position store's fence protects.
            with suppress(Retryable):
                owned = await self._admin.active(self._group, members)
                if owned != self._owned:
                    self._owned = owned
                    return owned
            await asyncio.sleep(_POLL_S)

    async def _join(self) -> None:
        count = await _patient(lambda: self._admin.partitions(self._topics[0]))
        topic = _GROUPS + self._group
        if not await self._admin.partitions(topic):
            await self._admin.create(topic, count)
        joined = await asyncio.to_thread(self._subscribe, topic, count)
        self._consumers = joined

    def _subscribe(self, topic: str, count: int) -> dict[int, Any]:
        made: dict[int, Any] = {}
        try:
            for number in range(count):
                made[number] = self._client().subscribe(
                    f"{topic}-partition-{number}",
                    _SUBSCRIPTION,
                    consumer_type=pulsar.ConsumerType.Failover,
                    consumer_name=self._name,
                    receiver_queue_size=1,
                )
        except pulsar.PulsarException as error:
            _close_all(made.values())
            raise Retryable(f"joining {self._group} failed: {error!r}", retry_after=1.0) from error
        return made

    async def report(self, positions: Mapping[TopicPartition, int]) -> None:
        """See `Membership.report`. A broker that is away makes the report moot, not wrong."""
        owned = self._owned or frozenset()
        self._told |= {key: at for key, at in positions.items() if key[1] in owned}
        mine = {key: at for key, at in self._told.items() if key[1] in owned}
        with suppress(Retryable):
            await self._admin.report(self._group, mine)

    async def close(self) -> None:
        """See `Membership.close`."""
        consumers, self._consumers = self._consumers, {}
        await asyncio.to_thread(_close_all, consumers.values())
        await self._admin.close()


async def _patient(ask: Callable[[], Awaitable[int]]) -> int:
    """Wait for a topic that was created a moment ago. Raises Retryable when it doesn't come."""
    for _ in range(50):
        count = await ask()
        if count:
            return count
        await asyncio.sleep(0.2)
    raise Retryable("Pulsar does not know the topics of a group (yet)")


def _close_all(consumers: Any) -> None:
    for one in list(consumers):
        with suppress(pulsar.PulsarException):  # one that lost its broker has nothing left to say
            one.close()
