"""A compose project of the test's own: its ports, secrets, images and volumes are nobody else's."""

from __future__ import annotations

import importlib.util
import os
import random
import re
import shutil
import socket
import subprocess
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import yaml

ROOT = Path(__file__).parents[2]
PROJECT = ROOT / "examples" / "flights"
WITH_STAND_IN = ("prometheus", "alertmanager")
"""What of the profile observability can run without registries."""
_WAIT_S = 420


def docker_missing() -> str:
    """Why containers can't run here; empty when they can."""
    if shutil.which("docker") is None:
        return "no docker on the path"
    for words in (["info"], ["compose", "version"]):
        asked = subprocess.run(["docker", *words], capture_output=True, text=True, check=False)
        if asked.returncode:
            return f"docker {' '.join(words)} fails: {asked.stderr.strip()[:200]}"
    return ""


@dataclass
class Containers:
    """`docker compose` for one project name, told by the example environment and what differs."""

    folder: Path
    bus: str
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        list(_prepare().write_secrets(self.folder / "secrets"))
        named = re.findall(r"\$\{(\w+_PORT)\b", (ROOT / "docker-compose.yml").read_text())
        self.ports = dict(zip(sorted(set(named)), _free_ports(len(set(named))), strict=True))
        self.environment = {
            "COMPOSE_PROJECT_NAME": f"causemesh-test-{self.bus}",
            "COMPOSE_ENV_FILES": str(ROOT / "deploy" / "compose" / "env.example"),
            "CAUSEMESH_BUS": self.bus,
            "CAUSEMESH_PROJECT": str(PROJECT),
            "CAUSEMESH_SECRETS": str(self.folder / "secrets"),
            "CAUSEMESH_PARTITIONS": "2",
            "COMPOSE_PROFILES": f"{self.bus},stand-in",
            "CAUSEMESH_STRIPE_URL": "http://stripe:18121",
            **{name: str(port) for name, port in self.ports.items()},
        }

    @property
    def token(self) -> str:
        """The bearer token of the admin APIs."""
        return (self.folder / "secrets" / "causemesh_api_token").read_text()

    def compose(self, *words: str, check: bool = True) -> str:
        """Run `docker compose`; see `run`."""
        return self.run("docker", "compose", *words, check=check)

    def run(self, *words: str, check: bool = True) -> str:
        """Run a command for this project; returns what it printed. Fails with the end of that."""
        done = subprocess.run(
            words,
            cwd=ROOT,
            env={**os.environ, **self.environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if check:
            assert done.returncode == 0, f"{' '.join(words)}:\n{done.stdout[-6000:]}"
        return done.stdout

    def build(self) -> None:
        """Build the images. A machine without registries has a COMPOSE_LAB, which makes stand-ins
        for the official ones first."""
        lab = os.environ.get("COMPOSE_LAB")
        if lab:
            services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
            more = [services[name]["image"] for name in WITH_STAND_IN]
            scripts = Path(lab).resolve()
            wanted = [["-f", "docker-compose.yml"], more]
            for words in wanted:
                subprocess.run(
                    [scripts / "images.sh", *words],
                    cwd=ROOT,
                    env={**os.environ, **self.environment},
                    check=True,
                )
        self.compose("build")

    def up(self, *services: str) -> None:
        """Start and wait until all is healthy. On failure the logs say why."""
        words = ["up", "--detach", "--wait", "--wait-timeout", str(_WAIT_S), *services]
        try:
            self.compose(*words)
        except AssertionError as error:
            logs = self.compose("logs", "--tail", "25", "--no-color", check=False)
            raise AssertionError(f"{error}\n{self.compose('ps', '-a')}\n{logs[-12000:]}") from None

    def down(self, *words: str) -> None:
        """Take down all of the project."""
        self.compose("--profile", "*", "down", "--remove-orphans", *words)

    def url(self, service: str) -> str:
        """Where a service's admin API is published."""
        return f"http://127.0.0.1:{self.ports[f'{service.upper()}_PORT']}"

    def client(self, service: str) -> httpx.Client:
        """An HTTP client for a service's admin API."""
        headers = {"Authorization": f"Bearer {self.token}"}
        return httpx.Client(base_url=self.url(service), headers=headers, timeout=60.0)

    def settings(self) -> dict[str, str]:
        """What a producer on this machine sets."""
        return {
            "CAUSEMESH_BUS": self.bus,
            "CAUSEMESH_PROJECT": str(PROJECT),
            "CAUSEMESH_PARTITIONS": "2",
            "CAUSEMESH_KAFKA_BOOTSTRAP": f"127.0.0.1:{self.ports['KAFKA_PORT']}",
            "CAUSEMESH_PULSAR_URL": f"pulsar://127.0.0.1:{self.ports['PULSAR_PORT']}",
            "CAUSEMESH_PULSAR_ADMIN_URL": f"http://127.0.0.1:{self.ports['PULSAR_ADMIN_PORT']}",
            "CAUSEMESH_REGISTRY_URL": (
                f"http://127.0.0.1:{self.ports['REGISTRY_PORT']}/apis/ccompat/v7"
            ),
        }


def _prepare() -> Any:
    path = ROOT / "deploy" / "compose" / "prepare.py"
    spec = importlib.util.spec_from_file_location("prepare", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _free_ports(count: int) -> list[int]:
    """Ports below those that the system gives to any connection, so that they are still free when
    the containers come up a second time."""
    found: list[int] = []
    with ExitStack() as stack:
        for port in random.sample(range(20_000, 32_000), 200):
            probe = stack.enter_context(socket.socket())
            with suppress(OSError):  # taken: the next
                probe.bind(("127.0.0.1", port))
                found.append(port)
            if len(found) == count:
                return found
    raise AssertionError(f"only {len(found)} free ports among 200")
