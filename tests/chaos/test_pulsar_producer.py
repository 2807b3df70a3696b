"""What the Pulsar producer's two rules are for: each switched off, on a real broker."""

from __future__ import annotations

import itertools
import random
import threading
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from causemesh.bus.base import BEFORE_FIRST, Outbound
from causemesh.catalogue import Catalogue
from causemesh.errors import MeshError, Retryable
from causemesh.local import Endpoints

pulsar_bus = pytest.importorskip("causemesh.bus.pulsar")
pytestmark = [pytest.mark.servers, pytest.mark.timeout(180)]
TOO_BIG = random.Random(0).randbytes(6 << 20)  # the broker takes 5 MB, compressed


@pytest.fixture
async def topic(pulsar: Endpoints) -> str:
    name = f"inbox.t{uuid.uuid4().hex}"
    async with connected(pulsar) as bus:
        admin = bus.admin()
        core = Catalogue.load(partitions=1).topic("inbox.requests")
        await admin.ensure([replace(core, name=name)])
        await admin.close()
    return name


@asynccontextmanager
async def connected(pulsar: Endpoints) -> AsyncIterator[Any]:
    """A bus with a connection of its own, as each process has."""
    bus = pulsar_bus.PulsarBus(pulsar.pulsar_url, pulsar.pulsar_admin_url)
    try:
        yield bus
    finally:
        await bus.close()


async def send(producer: Any, topic: str, values: Sequence[bytes]) -> None:
    await producer.send([Outbound(topic, 0, [None] * len(values), list(values))])


async def log_of(pulsar: Endpoints, topic: str) -> list[bytes | None]:
    async with connected(pulsar) as bus:
        reader = bus.reader({(topic, 0): BEFORE_FIRST})
        found: list[bytes | None] = []
        while raws := await reader.fetch(5_000, 2.0):
            found += [value for raw in raws for value in raw.values]
        await reader.close()
    return found


def names(monkeypatch: pytest.MonkeyPatch, *, unique: bool) -> None:
    """Without the rule every session of a service has the service's name."""
    if not unique:
        usual = pulsar_bus.PulsarProducer.__init__

        def same(self: Any, bus: Any, name: str) -> None:
            usual(self, bus, name)
            self._name, self._sessions = name, itertools.repeat("one")

        monkeypatch.setattr(pulsar_bus.PulsarProducer, "__init__", same)


@pytest.mark.parametrize("unique", [True, False])
async def test_a_process_that_was_replaced_does_not_keep_the_next_from_sending(
    pulsar: Endpoints, topic: str, monkeypatch: pytest.MonkeyPatch, unique: bool
) -> None:
    """Paused, it still holds its connection, and the broker lets one session have a name."""
    names(monkeypatch, unique=unique)
    async with connected(pulsar) as paused, connected(pulsar) as following:
        first, second = paused.producer("causemesh-x"), following.producer("causemesh-x")
        await send(first, topic, [b"a"])
        if unique:
            await send(second, topic, [b"b"])
        else:
            with pytest.raises(Retryable):
                await send(second, topic, [b"b"])
        await first.close()
        await second.close()
    assert await log_of(pulsar, topic) == ([b"a", b"b"] if unique else [b"a"])


def _all_at_once(producer: Any, windows: Sequence[Any]) -> None:
    """Every window in flight together."""
    results: list[Any] = []
    whole = threading.Event()
    rows = [row for window in windows for row in window]

    def told(result: Any, _: Any) -> None:
        results.append(result)
        if len(results) == len(rows):
            whole.set()

    for _, value, _ in rows:
        producer.send_async(value, told)
    producer.flush()
    assert whole.wait(30)
    if any(str(result) != "Result.Ok" for result in results):
        raise Retryable(f"some were not written: {set(map(str, results))}")


@pytest.mark.parametrize("one_window", [True, False])
async def test_nothing_is_written_behind_a_record_that_was_not(
    pulsar: Endpoints, topic: str, monkeypatch: pytest.MonkeyPatch, one_window: bool
) -> None:
    """Three windows, the second of which fails: the third must not be in the log."""
    if not one_window:
        windows_of = pulsar_bus._windows

        def whole(parts: Any) -> Iterator[list[Any]]:
            yield list(windows_of(parts))

        monkeypatch.setattr(pulsar_bus, "_windows", whole)
        monkeypatch.setattr(pulsar_bus, "_send", _all_at_once)
    small = [b"%d" % number for number in range(1_000)]
    async with connected(pulsar) as bus:
        producer = bus.producer("causemesh-x")
        with pytest.raises(MeshError):
            await send(producer, topic, [*small, TOO_BIG, b"behind"])
        await producer.close()
    found = await log_of(pulsar, topic)
    assert found[:1_000] == small
    assert (b"behind" in found) is not one_window
