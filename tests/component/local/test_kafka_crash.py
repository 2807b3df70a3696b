"""A Kafka that was killed is back as soon as it can start."""

from __future__ import annotations

import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from causemesh.local import Cluster, kafka

pytestmark = [pytest.mark.servers, pytest.mark.timeout(180)]
THEIR_SESSION_MS = "9000"  # Kafka's default


def waits_after_a_kill_s(home: Path) -> float:
    """How long a broker that was killed takes from when its controller is up, to be registered:
    how long the start before that takes is a matter of the machine."""
    cluster = Cluster(home, ["kafka"])
    controller = json.loads((home / "ports.json").read_text())["kafka_controller"]
    try:
        cluster.up()
        cluster.kill("kafka")
        with ThreadPoolExecutor(1) as pool:
            up = pool.submit(cluster.up)
            while not (up.done() or listens(controller)):
                time.sleep(0.02)
            began = time.monotonic()
            up.result()
        return time.monotonic() - began
    finally:
        cluster.down()


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_a_killed_broker_is_registered_again_at_once(tmp_path: Path) -> None:
    waits = waits_after_a_kill_s(tmp_path)
    print(f"\n{waits:.1f} s from the controller to the broker after a kill")
    assert waits < 6.0


def test_control_with_kafkas_own_session_it_waits_for_the_old_one_to_lapse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = kafka.Kafka._settings

    def theirs(self: kafka.Kafka) -> Path:
        path = settings(self)
        ours = "broker.session.timeout.ms=3000"
        assert ours in path.read_text()
        default = f"broker.session.timeout.ms={THEIR_SESSION_MS}"
        path.write_text(path.read_text().replace(ours, default))
        return path

    monkeypatch.setattr(kafka.Kafka, "_settings", theirs)
    assert waits_after_a_kill_s(tmp_path) > 6.0
