"""Ports of a home folder; and the demo keeps its hands off data that is not its own."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from causemesh.cli import running
from causemesh.errors import Fatal, Misdeclared
from causemesh.local.cluster import Cluster
from causemesh.local.ports import HOST, choose_ports, require_free
from examples.flights.demo import fresh_home


def unused() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def test_ports_once_chosen_are_kept_though_taken_later(tmp_path: Path) -> None:
    saved, port = tmp_path / "ports.json", unused()
    assert choose_ports(saved, {"kafka": port}) == {"kafka": port}
    with socket.socket() as taken:
        taken.bind((HOST, port))
        taken.listen()
        assert choose_ports(saved, {"kafka": port}) == {"kafka": port}
        assert choose_ports(saved, {"kafka": port + 1}) == {"kafka": port}


def test_a_taken_default_gives_way_to_a_free_port(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        chosen = choose_ports(tmp_path / "ports.json", {"kafka": port})["kafka"]
    assert chosen != port
    with socket.socket() as probe:
        probe.bind((HOST, chosen))


def test_chosen_ports_differ_and_no_outgoing_connection_takes_one(tmp_path: Path) -> None:
    """Linux gives those from 32768 on."""
    names = [f"server{number}" for number in range(500)]
    chosen = choose_ports(tmp_path / "ports.json", dict.fromkeys(names, 0))
    assert len(set(chosen.values())) == len(names)
    assert max(chosen.values()) < 32_768


def test_a_port_that_another_program_took_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(Fatal, match=rf"{port} \(kafka\).*taken.*delete .*ports\.json"):
            require_free({"kafka": port, "registry": unused()}, tmp_path / "ports.json")
    require_free({"kafka": port}, tmp_path / "ports.json")


def test_a_cluster_does_not_take_another_ones_server_for_its_own(tmp_path: Path) -> None:
    choose_ports(tmp_path / "ports.json", dict.fromkeys(["stripe"], 0))
    cluster = Cluster(tmp_path, ["stripe"])
    port = int(cluster.endpoints.stripe_url.rsplit(":", 1)[1])
    with socket.socket() as taken:
        taken.bind((HOST, port))
        taken.listen()
        with pytest.raises(Fatal, match=r"\(stripe\)"):
            cluster.up()
    try:
        cluster.up()
        cluster.up()  # what runs keeps its port
    finally:
        cluster.down()


def test_a_new_name_joins_what_was_chosen(tmp_path: Path) -> None:
    saved = tmp_path / "ports.json"
    saved.write_text(json.dumps({"kafka": 5, "gone": 6}))
    port = unused()
    assert choose_ports(saved, {"kafka": 7, "triton": port}) == {
        "kafka": 5,
        "gone": 6,
        "triton": port,
    }
    assert json.loads(saved.read_text())["triton"] == port


@pytest.mark.parametrize("name", ["kafka", "postgres", "registry"])
def test_the_demo_refuses_foreign_data_and_touches_nothing(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "down", lambda *_: pytest.fail("a foreign mesh was stopped"))
    (tmp_path / name).mkdir()
    (tmp_path / name / "precious").write_text("data")
    with pytest.raises(Misdeclared, match=r"not a demo's.*CAUSEMESH_HOME to another folder"):
        fresh_home(tmp_path)
    assert (tmp_path / name / "precious").read_text() == "data"
    assert sorted(path.name for path in tmp_path.iterdir()) == [name]


def test_the_demo_empties_its_own_data_and_keeps_the_rest(tmp_path: Path) -> None:
    home = tmp_path / "home"
    fresh_home(home)
    (home / "kafka").mkdir()
    (home / "kafka" / "old").write_text("data")
    (home / "artefacts").mkdir()
    fresh_home(home)
    assert not (home / "kafka").exists()
    assert (home / "artefacts").exists()
