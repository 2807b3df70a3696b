"""Kafka's fetch protocol: what to ask of a broker, and what its answer holds.

A fetch session (KIP-227) lets a request name only the partitions whose position has moved, and the
answer only those that have something to say. So a record that comes alone costs the work of one
partition, however many are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aiokafka.protocol.fetch import FetchRequest_v11
from aiokafka.protocol.offset import OffsetRequest

from causemesh.bus.base import TopicPartition
from causemesh.errors import Fatal

_CONSUMER = -1  # in place of a replica's id
_UNKNOWN = -1  # leader epoch, log start: not told
_NEW_SESSION = (0, 0)
_EARLIEST = -2
MAX_BYTES = 50 << 20
MAX_PARTITION_BYTES = 4 << 20


class _Prepared:
    """A request as aiokafka's connections take it, always of one version."""

    def __init__(self, request: Any) -> None:
        self._request = request

    def prepare(self, versions: Mapping[int, tuple[int, int]]) -> Any:
        lowest, highest = versions[self._request.API_KEY]
        if not lowest <= self._request.API_VERSION <= highest:
            raise Fatal("the Kafka broker is too old: 2.4 or later is needed")
        return self._request


@dataclass(frozen=True)
class Fetched:
    """What a broker has to say about one partition. `error` is Kafka's code, 0 for none; `end` is
    the offset behind the last record that readers may have."""

    source: TopicPartition
    error: int
    records: bytes
    end: int


class FetchSession:
    """What one broker knows of our positions."""

    def __init__(self) -> None:
        self._id, self._epoch = _NEW_SESSION
        self._told: dict[TopicPartition, int] = {}

    def reset(self) -> None:
        """Begin anew: the next request names every partition."""
        self._id, self._epoch = _NEW_SESSION
        self._told = {}

    def request(self, after: Mapping[TopicPartition, int], max_wait_s: float) -> Any:
        """Ask for what begins at these offsets."""
        moved: dict[str, list[tuple[int, int, int, int, int]]] = {}
        for (topic, partition), offset in after.items():
            if self._told.get((topic, partition)) != offset:
                row = (partition, _UNKNOWN, offset, _UNKNOWN, MAX_PARTITION_BYTES)
                moved.setdefault(topic, []).append(row)
        gone: dict[str, list[int]] = {}
        for topic, partition in self._told.keys() - after.keys():
            gone.setdefault(topic, []).append(partition)
        self._told = dict(after)
        return _Prepared(
            FetchRequest_v11(
                _CONSUMER,
                round(max_wait_s * 1000),
                1,  # answer as soon as there is anything
                MAX_BYTES,
                0,  # the mesh's records are not written in transactions
                self._id,
                self._epoch,
                list(moved.items()),
                list(gone.items()),
                "",
            )
        )

    def accept(self, response: Any) -> int:
        """Take note of an answer's session; returns Kafka's code when it is refused, 0 if not."""
        if response.error_code:
            self.reset()
            return int(response.error_code)
        if response.session_id == 0:  # the broker keeps none for us: name all, always
            self.reset()
        else:
            self._id = response.session_id
            self._epoch += 1
        return 0


def fetched(topics: Sequence[Any]) -> Iterator[Fetched]:
    """The partitions of an answer."""
    for topic, partitions in topics:
        for partition, error, end, *_, records in partitions:
            yield Fetched((topic, partition), error, records or b"", end)


def earliest(source: TopicPartition) -> Any:
    """Ask where the log of a partition begins now."""
    topic, partition = source
    return OffsetRequest(_CONSUMER, 0, [(topic, [(partition, _EARLIEST)])])


def told_earliest(response: Any) -> tuple[int, int]:
    """Kafka's error code, 0 for none, and the offset."""
    ((_, ((_, error, *_, offset),)),) = response.topics
    return int(error), int(offset)
