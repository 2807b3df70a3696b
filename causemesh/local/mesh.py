"""The service processes of a local mesh, kept running by a supervisor process."""

from __future__ import annotations

import functools
import json
import os
import secrets
import signal
import ssl
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import httpx

from causemesh.catalogue import LAKE, SERVICES, TRANSFORMS
from causemesh.errors import Fatal, Misdeclared
from causemesh.local.cluster import Cluster, Endpoints, ServerStatus
from causemesh.local.ports import choose_ports, require_free
from causemesh.local.process import ServerProcess
from causemesh.settings import API_PORTS

_HOST = "127.0.0.1"
_READY_S = 90.0
_POLL_S = 0.25
_CRASH_LOOP = 5
_STEADY_S = 20.0
_OF_LAKE = "CAUSEMESH_LAKE_"
_MODULES = {
    LAKE: "services.features.lake.app",
    TRANSFORMS: "services.features.transforms.app",
}
"""The processes that are not a service's own app."""
_NICE = {LAKE: 3}
"""Half the weight of the others: somebody waits for them, and nobody for a snapshot."""


class Mesh:
    """The services of one home folder, run on one cluster for one project."""

    def __init__(
        self, home: Path, endpoints: Endpoints, project: Path, services: Sequence[str] = SERVICES
    ) -> None:
        known = (*SERVICES, LAKE, TRANSFORMS)
        unknown = sorted(set(services) - set(known))
        if unknown:
            raise Misdeclared(f"unknown services {unknown}; known: {', '.join(known)}")
        self.home = home.resolve()
        self._endpoints = endpoints
        self._project = project.resolve()
        self.services = tuple(services)
        self._ports = choose_ports(self.home / "service-ports.json", API_PORTS)
        self.extra: dict[str, str] = {}
        """More settings for every service, such as CAUSEMESH_PARTITIONS."""

    @property
    def token(self) -> str:
        """The bearer token of the admin APIs, made once."""
        kept = self.home / "token"
        if not kept.exists():
            kept.touch(mode=0o600)
            kept.write_text(secrets.token_urlsafe(24))
        return kept.read_text()

    def url(self, service: str) -> str:
        """Where a service's admin API answers."""
        return f"http://{_HOST}:{self._ports[service]}"

    def client(self, service: str) -> httpx.Client:
        """An HTTP client for a service's admin API."""
        headers = {"Authorization": f"Bearer {self.token}"}
        url = self.url(service)
        return httpx.Client(base_url=url, headers=headers, timeout=60.0, verify=_certificates())

    def environment(self) -> dict[str, str]:
        """The settings of every service, and of tools that join the mesh."""
        endpoints = self._endpoints.environment()
        if "CAUSEMESH_STRIPE_KEY" in os.environ:
            endpoints.pop("CAUSEMESH_STRIPE_URL")  # with a key it is the real Stripe
        return {
            **endpoints,
            "CAUSEMESH_PROJECT": str(self._project),
            "CAUSEMESH_API_TOKEN": self.token,
            "CAUSEMESH_LAKE_WAREHOUSE": f"file://{self.home / 'lake'}",
            "CAUSEMESH_CHECKPOINTS": os.environ.get(
                "CAUSEMESH_CHECKPOINTS", f"file://{self.home / 'checkpoints'}"
            ),
            **{name: value for name, value in os.environ.items() if name.startswith(_OF_LAKE)},
            # the embedded broker allows it, and a service that was killed is back that much sooner
            "CAUSEMESH_SESSION_TIMEOUT_MS": os.environ.get("CAUSEMESH_SESSION_TIMEOUT_MS", "3000"),
            **self.extra,
        }

    def process(self, service: str) -> ServerProcess:
        """A service's process."""
        environment = {
            **self.environment(),
            "CAUSEMESH_API_PORT": str(self._ports[service]),
            "POLARS_MAX_THREADS": os.environ.get("POLARS_MAX_THREADS", "1"),
        }
        return ServerProcess(service, self.home, environment, nice=_NICE.get(service, 0))

    def up(self, progress: Callable[[str, str], None] = lambda name, state: None) -> None:
        """Start the supervisor and wait until every service is ready. Raises Fatal with the end of
        a log, or when a port is another program's."""
        idle = [name for name in self.services if self.process(name).running() is None]
        require_free({name: self._ports[name] for name in idle}, self.home / "service-ports.json")
        plan = {
            "project": str(self._project),
            "services": list(self.services),
            "extra": self.extra,
        }
        (self.home / "mesh.json").write_text(json.dumps(plan))
        self._supervisor().start([sys.executable, "-m", "causemesh.local.mesh", self.home])
        deadline = time.monotonic() + _READY_S
        for service in self.services:
            progress(service, "starting")
            while not self.ready(service):
                if self._supervisor().running() is None:
                    raise Fatal(f"the services did not start:\n{self._supervisor().tail()}")
                if time.monotonic() > deadline:
                    tail = self.process(service).tail()
                    raise Fatal(f"{service} was not ready in {_READY_S:.0f} s:\n{tail}")
                time.sleep(_POLL_S)
            progress(service, "ready")

    def ready(self, service: str) -> bool:
        """Whether a service says that it can do its work."""
        if self.process(service).running() is None:
            return False  # whatever answers on its port is another mesh's
        try:
            url = f"{self.url(service)}/ready"
            return httpx.get(url, timeout=2.0, verify=_certificates()).status_code == 200
        except httpx.TransportError:
            return False

    def down(self) -> None:
        """Stop the supervisor and the services; each finishes its unit of work."""
        self._supervisor().stop(timeout_s=20.0)
        self.stop_services()

    def stop_services(self) -> None:
        """Stop the services, all at once."""
        running = [self.process(name) for name in self.services]
        for one in running:
            process = one.running()
            if process is not None:
                process.send_signal(signal.SIGTERM)
        for one in running:
            one.stop()

    def kill(self, service: str) -> None:
        """End one service at once, as a crash does; the supervisor starts it again."""
        process = self.process(service).running()
        if process is not None:
            process.kill()

    def status(self) -> list[ServerStatus]:
        """Every service's process."""
        return [self._status(name) for name in self.services]

    def _status(self, name: str) -> ServerStatus:
        process = self.process(name).running()
        if process is None:
            return ServerStatus(name, None, self._ports[name], 0, 0.0)
        uptime = time.time() - process.create_time()
        rss = process.memory_info().rss
        return ServerStatus(name, process.pid, self._ports[name], rss, uptime)

    def _supervisor(self) -> ServerProcess:
        return ServerProcess("supervisor", self.home)


def mesh_of(home: Path) -> Mesh | None:
    """The mesh that was last started under `home`; None when there was none."""
    plan = home / "mesh.json"
    if not plan.exists():
        return None
    saved: Mapping[str, object] = json.loads(plan.read_text())
    mesh = Mesh(
        home,
        Cluster(home).endpoints,
        Path(str(saved["project"])),
        list(saved["services"]),  # type: ignore[call-overload]
    )
    mesh.extra = dict(saved["extra"])  # type: ignore[call-overload]
    return mesh


@functools.cache
def _certificates() -> ssl.SSLContext:
    """Made once: httpx reads all the system's certificates for every client, 25 ms each time."""
    return ssl.create_default_context()


class _Supervisor:
    """Starts services that do not run; one that keeps crashing ends it with the reason."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._started: dict[str, list[float]] = {name: [] for name in mesh.services}
        self._stopping = False

    def run(self) -> None:
        """Supervise until SIGTERM, then stop the services."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        while not self._stopping:
            _reap()
            for name in self._mesh.services:
                self._keep(name)
            time.sleep(_POLL_S)
        self._mesh.stop_services()

    def _stop(self, *_: object) -> None:
        self._stopping = True

    def _keep(self, name: str) -> None:
        process = self._mesh.process(name)
        if process.running() is not None:
            return
        now = time.monotonic()
        recent = [at for at in self._started[name] if now - at < _STEADY_S]
        if len(recent) >= _CRASH_LOOP:
            self._mesh.stop_services()
            sys.exit(f"{name} ended {_CRASH_LOOP} times in a row; its log ends:\n{process.tail()}")
        self._started[name] = [*recent, now]
        process.start([sys.executable, "-m", _MODULES.get(name, f"services.{name}.app")])


def _reap() -> None:
    """Collect ended children, so that they do not linger as zombies."""
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return


def _main() -> None:
    mesh = mesh_of(Path(sys.argv[1]))
    if mesh is None:
        sys.exit(f"no mesh was started under {sys.argv[1]}")
    _Supervisor(mesh).run()


if __name__ == "__main__":
    _main()
