"""Kafka's errors reach callers as the mesh's own."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiokafka.errors import NodeNotReadyError

from causemesh.bus.kafka import KafkaAdmin
from causemesh.catalogue import Catalogue
from causemesh.errors import Retryable


class _Away:
    """An admin client whose broker went away after it was opened."""

    async def _fail(self, *_: object) -> None:
        raise NodeNotReadyError

    list_topics = describe_topics = list_consumer_group_offsets = _fail


class _Opened(KafkaAdmin):
    async def _opened(self) -> Any:
        return _Away()


@pytest.mark.parametrize(
    "call",
    [
        lambda admin: admin.ends(["inbox.requests"]),
        lambda admin: admin.reported("group"),
        lambda admin: admin.ensure([Catalogue.load().topic("inbox.requests")]),
    ],
    ids=["ends", "reported", "ensure"],
)
async def test_a_broker_that_goes_away_is_worth_waiting_for(
    call: Callable[[KafkaAdmin], Awaitable[object]],
) -> None:
    with pytest.raises(Retryable, match="NodeNotReady"):
        await call(_Opened("127.0.0.1:1", 1))
