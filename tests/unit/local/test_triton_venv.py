"""The server's environment is made once, and again when making it was cut short."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from causemesh.errors import Fatal, Misdeclared
from causemesh.local import Cluster, artefacts
from causemesh.local.cluster import ALL_SERVERS


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Where the environment was made; making it is replaced by the first half of the work."""
    folders: list[Path] = []

    def install(kept: Path) -> None:
        folders.append(kept)
        (kept / "bin").mkdir(parents=True, exist_ok=True)
        if len(folders) == 1:
            raise Fatal("the network is away")

    monkeypatch.setenv("CAUSEMESH_CACHE", str(tmp_path))
    monkeypatch.setattr(artefacts, "_install_triton", install)
    return folders


def _ignore(server: str, state: str) -> None: ...


def test_an_environment_cut_short_is_made_again_and_a_whole_one_is_kept(made: list[Path]) -> None:
    with pytest.raises(Fatal, match="network"):
        artefacts.triton_venv(_ignore)
    assert artefacts.triton_venv(_ignore) == made[0]
    assert artefacts.triton_venv(_ignore) == made[0]
    assert len(made) == 2


def test_other_requirements_make_another_environment(
    made: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Fatal, match="network"):
        artefacts.triton_venv(_ignore)
    other = tmp_path / "triton.txt"
    other.write_text("numpy==1.26.3\n")
    monkeypatch.setattr(artefacts, "TRITON_REQUIREMENTS", other)
    assert artefacts.triton_venv(_ignore) != made[0]


def test_missing_requirements_say_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artefacts, "TRITON_REQUIREMENTS", tmp_path / "triton.txt")
    with pytest.raises(Misdeclared, match=r"triton\.txt is missing"):
        artefacts.triton_venv(_ignore)


def test_a_home_from_before_triton_keeps_its_ports(tmp_path: Path) -> None:
    old = {"kafka": 1, "kafka_controller": 2, "registry": 3, "registry_management": 4}
    (tmp_path / "ports.json").write_text(json.dumps(old | {"postgres": 5}))
    endpoints = Cluster(tmp_path, ALL_SERVERS).endpoints
    assert endpoints.kafka_bootstrap == "127.0.0.1:1"
    assert Cluster(tmp_path).endpoints == endpoints
    assert json.loads((tmp_path / "ports.json").read_text()).items() >= old.items()


def test_an_unknown_server_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Misdeclared, match="known: kafka, registry, postgres, triton"):
        Cluster(tmp_path, ("tritn",))
