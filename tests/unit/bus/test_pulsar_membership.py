"""Joining a group on Pulsar while the broker is too busy to answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pulsar
import pytest

from causemesh.bus.pulsar_admin import PulsarMembership
from causemesh.errors import Retryable


class BusyAtFirst:
    """A client whose first subscriptions find no connection."""

    def __init__(self, failures: int) -> None:
        self.left = failures
        self.closed = 0

    def subscribe(self, *_: Any, **__: Any) -> BusyAtFirst:
        if self.left:
            self.left -= 1
            raise pulsar.ConnectError("not established in 2000 ms")
        return self

    def close(self) -> None:
        self.closed += 1


class KnowsAll:
    """An admin API on which every topic has two partitions, all active here."""

    async def partitions(self, _: str) -> int:
        return 2

    async def active(self, _: str, members: Mapping[int, str]) -> frozenset[int]:
        return frozenset(members)

    async def close(self) -> None: ...


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits, none of them waited for."""
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr("causemesh.bus.pulsar_admin.asyncio.sleep", sleep)
    return waits


async def test_joining_goes_on_until_the_broker_answers(at_once: list[float]) -> None:
    client = BusyAtFirst(failures=3)
    member = PulsarMembership(lambda: client, "http://127.0.0.1:1", "group", ["topic"])
    await member._admin.close()
    member._admin = KnowsAll()  # type: ignore[assignment]
    assert await member.changed() == {0, 1}
    assert at_once == [1.0, 1.0, 1.0]
    await member.close()
    assert client.closed == 2


async def test_one_attempt_says_that_it_may_be_repeated() -> None:
    client = BusyAtFirst(failures=1)
    member = PulsarMembership(lambda: client, "http://127.0.0.1:1", "group", ["topic"])
    await member._admin.close()
    member._admin = KnowsAll()  # type: ignore[assignment]
    with pytest.raises(Retryable, match="joining group failed"):
        await member._join()
