"""Lines that repeat are shown first, then counted; others are not touched."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Iterator

import pytest

from causemesh.log_limit import RepeatLimit
from causemesh.telemetry import configure_logging

EVERY_S = 0.2


class Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.closed = False

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def close(self) -> None:
        self.closed = True
        super().close()


@pytest.fixture
def kept() -> Kept:
    return Kept()


@pytest.fixture
def limit(kept: Kept) -> Iterator[RepeatLimit]:
    made = RepeatLimit(kept, first=3, every_s=EVERY_S)
    yield made
    made.close()


@pytest.fixture
def log(limit: RepeatLimit) -> logging.Logger:
    logger = logging.Logger("aiokafka.conn")
    logger.addHandler(limit)
    return logger


def held(lines: list[str]) -> list[int]:
    """The counts that summaries tell."""
    return [int(found[1]) for line in lines if (found := re.search(r"last of (\d+) such", line))]


def settled(kept: Kept, lines: int) -> list[str]:
    deadline = time.monotonic() + 10
    while len(kept.lines) < lines and time.monotonic() < deadline:
        time.sleep(0.01)
    return kept.lines


def test_the_first_lines_pass_and_the_rest_are_counted(log: logging.Logger, kept: Kept) -> None:
    for number in range(1_000):
        log.error("no connection to %s", number)
    assert kept.lines == [f"no connection to {number}" for number in range(3)]
    shown = settled(kept, 4)
    assert shown[3] == "no connection to 999 (the last of 997 such lines that were held back)"


def test_while_it_goes_on_there_is_a_line_a_window_and_none_is_lost(
    log: logging.Logger, limit: RepeatLimit, kept: Kept
) -> None:
    began, count = time.monotonic(), 0
    while time.monotonic() - began < 5 * EVERY_S:
        log.warning("away")
        count += 1
        time.sleep(0.001)
    windows = (time.monotonic() - began) / EVERY_S
    limit.close()
    assert kept.closed
    assert 3 + sum(held(kept.lines)) == count
    assert 2 <= len(held(kept.lines)) <= windows + 1


def test_control_without_the_limit_every_line_comes(kept: Kept) -> None:
    logger = logging.Logger("aiokafka.conn")
    logger.addHandler(kept)
    for number in range(1_000):
        logger.error("no connection to %s", number)
    assert len(kept.lines) == 1_000


def test_places_are_counted_apart_and_a_silent_one_begins_anew(
    log: logging.Logger, limit: RepeatLimit, kept: Kept
) -> None:
    for _ in range(5):
        log.warning("one")
        log.warning("other")
    assert kept.lines == ["one", "other"] * 3
    shown = settled(kept, 8)
    assert sorted(shown[6:]) == [
        f"{name} (the last of 2 such lines that were held back)" for name in ("one", "other")
    ]
    deadline = time.monotonic() + 10
    while limit._windows and time.monotonic() < deadline:
        time.sleep(0.01)
    for _ in range(5):
        log.warning("one")
    assert kept.lines[8:] == ["one"] * 3


def test_a_service_logs_through_it(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("ingest")
    for number in range(500):
        logging.getLogger("aiokafka").error("Unable connect to node %s", number)
    logging.getLogger("other").warning("still heard")
    configure_logging("ingest")  # closes the handler before
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    told = [line["event"] for line in lines if line["logger"] == "aiokafka"]
    assert told[:3] == [f"Unable connect to node {number}" for number in range(3)]
    assert held(told) == [497]
    assert len(told) == 4
    assert [line["event"] for line in lines if line["logger"] == "other"] == ["still heard"]
