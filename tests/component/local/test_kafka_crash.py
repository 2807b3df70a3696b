"""A Kafka that was killed is back as soon as it can start."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from causemesh.local import Cluster, kafka

pytestmark = [pytest.mark.servers, pytest.mark.timeout(180)]
THEIR_SESSION_MS = "9000"  # Kafka's default


def longer_after_a_kill_s(home: Path) -> float:
    """By how much a start after kill -9 takes longer than one after an orderly stop."""
    cluster = Cluster(home, ["kafka"])
    try:
        cluster.up()
        cluster.down()
        orderly = up_s(cluster)
        cluster.kill("kafka")
        return up_s(cluster) - orderly
    finally:
        cluster.down()


def up_s(cluster: Cluster) -> float:
    began = time.monotonic()
    cluster.up()
    return time.monotonic() - began


def test_a_killed_broker_is_registered_again_at_once(tmp_path: Path) -> None:
    longer = longer_after_a_kill_s(tmp_path)
    print(f"\n{longer:.1f} s longer after a kill")
    assert longer < 6.0


def test_control_with_kafkas_own_session_it_waits_for_the_old_one_to_lapse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = kafka.Kafka._settings

    def theirs(self: kafka.Kafka) -> Path:
        path = settings(self)
        ours = "broker.session.timeout.ms=2000"
        assert ours in path.read_text()
        default = f"broker.session.timeout.ms={THEIR_SESSION_MS}"
        path.write_text(path.read_text().replace(ours, default))
        return path

    monkeypatch.setattr(kafka.Kafka, "_settings", theirs)
    assert longer_after_a_kill_s(tmp_path) > 6.0
