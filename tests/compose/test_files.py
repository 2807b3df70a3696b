"""What docker compose itself makes of the files; nothing is started."""

from __future__ import annotations

import json
import os
import subprocess
from typing import Any

import pytest

from tests.compose.containers import ROOT, docker_missing

_MISSING = docker_missing()
pytestmark = [
    pytest.mark.compose,
    pytest.mark.skipif(bool(_MISSING), reason=f"needs Docker with compose: {_MISSING}"),
]
EXAMPLE = ("--env-file", "deploy/compose/env.example")


def compose(*words: str, **changed: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("CAUSEMESH_", "COMPOSE_"))}
    return subprocess.run(
        ["docker", "compose", *words],
        cwd=ROOT,
        env={**kept, **changed},
        capture_output=True,
        text=True,
        check=False,
    )


def model(*words: str, **changed: str) -> dict[str, Any]:
    done = compose(*EXAMPLE, *words, "config", "--format", "json", **changed)
    assert done.returncode == 0, done.stderr
    read: dict[str, Any] = json.loads(done.stdout)
    return read


def test_without_an_environment_it_says_how_to_make_one() -> None:
    done = compose("--env-file", "/dev/null", "config", "--quiet")
    assert done.returncode != 0
    assert "there is no .env yet, make it with: make compose-env" in done.stderr


@pytest.mark.parametrize("bus", ["kafka", "pulsar"])
def test_one_setting_chooses_the_broker(bus: str) -> None:
    (other,) = {"kafka", "pulsar"} - {bus}
    services = model(CAUSEMESH_BUS=bus)["services"]
    assert {bus, "stripe"} <= services.keys()
    assert not {other, "prometheus"} & services.keys()
    assert services["features"]["environment"]["CAUSEMESH_BUS"] == bus


def test_every_profile_at_once_is_valid_too() -> None:
    services = model("--profile", "*")["services"]
    assert {"kafka", "pulsar", "stripe", "prometheus", "grafana", "loki"} <= services.keys()


def test_the_gpu_overlay_adds_the_devices() -> None:
    files = ("-f", "docker-compose.yml", "-f", "deploy/compose/gpu.yml")
    plain = model()["services"]["triton"]["deploy"]["resources"]
    overlaid = model(*files)["services"]["triton"]["deploy"]["resources"]
    assert "reservations" not in plain
    (device,) = overlaid["reservations"]["devices"]
    assert (device["driver"], device["capabilities"], device["count"]) == ("nvidia", ["gpu"], -1)
    assert overlaid["limits"]["cpus"] == plain["limits"]["cpus"]


def test_the_overlay_of_object_storage_changes_features_alone() -> None:
    files = ("-f", "docker-compose.yml", "-f", "deploy/compose/objects.yml")
    place = "s3://bucket/folder?region=eu-central-1"
    plain = model()["services"]
    overlaid = model(*files, CAUSEMESH_CHECKPOINTS=place)["services"]
    features = overlaid.pop("features")
    assert features["environment"]["CAUSEMESH_CHECKPOINTS"] == place
    assert features["build"]["args"] == {"SERVICE": "features", "EXTRA": "objects"}
    told = {one["source"] for one in features["secrets"]}
    assert told >= {"causemesh_api_token", "aws_access_key_id", "aws_secret_access_key"}
    assert overlaid == {name: one for name, one in plain.items() if name != "features"}
    untold = compose(*EXAMPLE, *files, "config", "--quiet")
    assert untold.returncode != 0
    assert "say where, such as s3://" in untold.stderr
