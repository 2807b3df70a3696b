"""Fault points: declared once, each placed in the code, off unless armed."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from causemesh import faultpoints
from causemesh.errors import Misdeclared, Retryable
from causemesh.faultpoints import Point, arm, reach

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    arm("")


def test_every_declared_point_is_placed_once() -> None:
    sources = [*ROOT.glob("causemesh/**/*.py"), *ROOT.glob("services/**/*.py")]
    code = "\n".join(path.read_text() for path in sources)
    placed = re.findall(r"\breach\(Point\.(\w+)\)", code)
    assert sorted(placed) == sorted(Point.__members__)


def test_nothing_happens_unless_armed() -> None:
    for point in Point:
        reach(point)


def test_an_error_comes_at_its_point_at_its_count_once() -> None:
    arm("worker.sent:error:2")
    reach(Point.WORKER_SENT)
    reach(Point.WORKER_FETCHED)
    with pytest.raises(Retryable, match=r"worker\.sent"):
        reach(Point.WORKER_SENT)
    reach(Point.WORKER_SENT)


@pytest.mark.parametrize(
    ("action", "number"), [("kill", signal.SIGKILL), ("pause", signal.SIGSTOP)]
)
def test_kill_and_pause_signal_the_process_itself(
    monkeypatch: pytest.MonkeyPatch, action: str, number: signal.Signals
) -> None:
    sent: list[int] = []
    monkeypatch.setattr(faultpoints.os, "kill", lambda pid, number: sent.append(number))
    arm(f"outbox.sent:{action}")
    reach(Point.OUTBOX_SENT)
    assert sent == [number]


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ("worker.snet:kill", "worker.snet is none of the points worker.claimed"),
        ("worker.sent", "nothing is none of kill, pause, error"),
        ("worker.sent:explode", "explode is none of kill"),
        ("worker.sent:kill:0", "the count must be"),
        ("worker.sent:kill:x", "the count must be"),
    ],
)
def test_a_wrong_setting_is_told(setting: str, problem: str) -> None:
    with pytest.raises(Misdeclared, match=problem):
        arm(setting)
