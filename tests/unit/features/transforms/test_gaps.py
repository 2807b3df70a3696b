"""What does not follow the stored position is not taken for what follows it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from faust.types import TP

from services.features.transforms.stream import Stream, _ReadOffsets

FEED = TP("feed", 1)


class Consumer:
    """Notes where it is told to go on."""

    def __init__(self, earliest: int) -> None:
        self.earliest = earliest
        self.sought: list[tuple[TP, int]] = []

    async def seek(self, tp: TP, offset: int) -> None:
        self.sought.append((tp, offset))

    async def earliest_offsets(self, *tps: TP) -> dict[TP, int]:
        return dict.fromkeys(tps, self.earliest)


@pytest.mark.parametrize(
    ("offsets", "earliest", "run", "back"),
    [
        ([5, 6, 7], 0, [5, 6, 7], None),
        ([3, 4, 5, 6], 0, [5, 6], None),  # stored already
        ([5, 6, 5, 6, 7], 0, [5, 6, 7], None),  # fetched again
        ([8, 9], 0, [], 5),  # 5 to 7 were never given
        ([5, 6, 9], 0, [5, 6], 7),
        ([8, 9, 5, 6], 0, [5, 6], None),  # two of before reading went back, then what it went for
        ([8, 9, 5, 6, 9], 0, [5, 6], 7),
        ([8, 9], 8, [8, 9], None),  # the broker deleted what was before
        ([8, 10], 8, [8], 9),
        ([], 0, [], None),
    ],
)
async def test_only_what_follows_is_taken(
    offsets: list[int], earliest: int, run: list[int], back: int | None
) -> None:
    consumer, stream = Consumer(earliest), object.__new__(Stream)
    stream._app = SimpleNamespace(consumer=consumer)  # type: ignore[assignment]
    worker: Any = SimpleNamespace(
        transform=SimpleNamespace(feed=FEED.topic), position=lambda number: 4
    )
    messages = [SimpleNamespace(offset=offset) for offset in offsets]
    taken = await stream._following(worker, FEED.partition, messages)
    assert [one.offset for one in taken] == run
    assert consumer.sought == ([] if back is None else [(FEED, back)])


@pytest.mark.parametrize("length", range(1, 12))
async def test_going_back_comes_to_an_end_however_messages_come_together(length: int) -> None:
    """Each seek brings all from there on again, behind what was fetched before; lists of any length
    are cut out of that."""
    log, position = list(range(5, 30)), 4
    coming = log[1:]  # the first one was lost
    consumer, stream = Consumer(0), object.__new__(Stream)
    stream._app = SimpleNamespace(consumer=consumer)  # type: ignore[assignment]
    worker: Any = SimpleNamespace(
        transform=SimpleNamespace(feed=FEED.topic), position=lambda number: position
    )
    for _ in range(1_000):
        if position == log[-1]:
            break
        cut, coming = coming[:length], coming[length:]
        messages = [SimpleNamespace(offset=offset) for offset in cut]
        for one in await stream._following(worker, FEED.partition, messages):
            assert one.offset == position + 1
            position = one.offset
        coming += [at for _, back in consumer.sought for at in log if at >= back]
        consumer.sought.clear()
    assert position == log[-1]


def test_faust_does_not_know_how_far_a_feed_was_read() -> None:
    """It would drop what comes again after reading went back."""
    read = _ReadOffsets(lambda tp: tp.topic == FEED.topic)
    changelog = TP("changelog", 0)
    read[FEED] = read[changelog] = 7
    assert (read[FEED], read[changelog], read[TP("changelog", 1)]) == (None, 7, None)
