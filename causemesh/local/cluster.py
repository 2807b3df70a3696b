"""The cluster as a whole: ports, start in parallel, status, stop."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from causemesh.errors import Misdeclared
from causemesh.local.artefacts import Progress
from causemesh.local.kafka import Kafka
from causemesh.local.ports import choose_ports, require_free
from causemesh.local.pulsar import Pulsar
from causemesh.local.registry import Registry
from causemesh.local.servers import HOST, Postgres, Server, StripeStandIn
from causemesh.local.triton import Triton

_DEFAULT_PORTS = {
    "kafka": 19092,
    "kafka_controller": 19093,
    "registry": 18081,
    "registry_management": 18082,
    "postgres": 15432,
    "triton": 18001,
    "triton_metrics": 18002,
    "stripe": 18121,
    "pulsar": 16650,
    "pulsar_web": 16080,
    "pulsar_bookie": 16651,
}
SERVERS = ("kafka", "registry", "postgres")
ALL_SERVERS = (*SERVERS, "triton", "stripe", "pulsar")


@dataclass(frozen=True)
class Endpoints:
    """Where the servers answer, started or not.

    `triton_url` is host and port of its gRPC door; `triton_models` is the folder of its models;
    `stripe_url` is that of the Stripe stand-in.
    """

    kafka_bootstrap: str
    registry_url: str
    postgres_url: str
    triton_url: str
    triton_models: str
    stripe_url: str
    pulsar_url: str = ""
    pulsar_admin_url: str = ""

    def environment(self) -> dict[str, str]:
        """The settings that point a service at this cluster."""
        return {f"CAUSEMESH_{name.upper()}": value for name, value in asdict(self).items()}

    def database(self, name: str) -> str:
        """The SQLAlchemy URL of one database."""
        return f"{self.postgres_url}/{name}"


@dataclass(frozen=True)
class ServerStatus:
    """One server as it is now."""

    name: str
    pid: int | None
    port: int
    rss_bytes: int
    uptime_s: float


class Cluster:
    """The servers under one home folder. `up` and `down` may be called again at any time."""

    def __init__(self, home: Path, servers: Sequence[str] = SERVERS) -> None:
        unknown = set(servers) - set(ALL_SERVERS)
        if unknown:
            known = ", ".join(ALL_SERVERS)
            raise Misdeclared(f"unknown servers {sorted(unknown)}; known: {known}")
        self._home = home.resolve()
        self._home.mkdir(parents=True, exist_ok=True)
        self._ports = choose_ports(self._home / "ports.json", _DEFAULT_PORTS)
        made: dict[str, Callable[[], Server]] = {
            "kafka": lambda: Kafka(
                self._home, self._ports["kafka"], self._ports["kafka_controller"]
            ),
            "registry": lambda: Registry(
                self._home, self._ports["registry"], self._ports["registry_management"]
            ),
            "postgres": lambda: Postgres(self._home, self._ports["postgres"]),
            "triton": lambda: Triton(
                self._home, self._ports["triton"], self._ports["triton_metrics"]
            ),
            "stripe": lambda: StripeStandIn(self._home, self._ports["stripe"]),
            "pulsar": lambda: Pulsar(
                self._home,
                self._ports["pulsar"],
                self._ports["pulsar_web"],
                self._ports["pulsar_bookie"],
            ),
        }
        self._servers = {name: made[name]() for name in servers}

    @property
    def endpoints(self) -> Endpoints:
        """Where the servers answer, or will."""
        return Endpoints(
            f"{HOST}:{self._ports['kafka']}",
            f"http://{HOST}:{self._ports['registry']}/apis/ccompat/v7",
            f"postgresql+asyncpg://causemesh@{HOST}:{self._ports['postgres']}",
            f"{HOST}:{self._ports['triton']}",
            str(Triton.models_under(self._home)),
            f"http://{HOST}:{self._ports['stripe']}",
            f"pulsar://{HOST}:{self._ports['pulsar']}",
            f"http://{HOST}:{self._ports['pulsar_web']}",
        )

    def triton_addresses(self) -> tuple[str, str]:
        """Triton's gRPC address and the URL of its metrics."""
        metrics = f"http://{HOST}:{self._ports['triton_metrics']}"
        return self.endpoints.triton_url, metrics

    def up(self, progress: Progress = lambda server, state: None) -> Endpoints:
        """Start what does not run; returns when all work.

        Raises Fatal with the end of a log, or when a port is another program's.
        """
        idle = [name for name, one in self._servers.items() if one.process.running() is None]
        require_free(
            {of: port for of, port in self._ports.items() if of.split("_")[0] in idle},
            self._home / "ports.json",
        )
        with ThreadPoolExecutor(len(self._servers)) as pool:
            for done in [pool.submit(one.start, progress) for one in self._servers.values()]:
                done.result()
        return self.endpoints

    def down(self) -> None:
        """Stop all servers; their data stays."""
        with ThreadPoolExecutor(len(self._servers)) as pool:
            for done in [pool.submit(one.stop) for one in self._servers.values()]:
                done.result()

    def stop(self, name: str) -> None:
        """Stop one server in its own orderly way; its data stays."""
        self._servers[name].stop()

    def kill(self, name: str) -> None:
        """End one server at once, as a crash does."""
        process = self._servers[name].process.running()
        if process is not None:
            process.kill()
            process.wait(10)

    def status(self) -> list[ServerStatus]:
        """Every server's state."""
        return [self._status(name, server) for name, server in self._servers.items()]

    @staticmethod
    def _status(name: str, server: Server) -> ServerStatus:
        process = server.process.running()
        if process is None:
            return ServerStatus(name, None, server.port, 0, 0.0)
        uptime = time.time() - process.create_time()
        return ServerStatus(name, process.pid, server.port, process.memory_info().rss, uptime)
