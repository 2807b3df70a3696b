"""A schema registry."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import httpx

from causemesh.local import artefacts
from causemesh.local.aot import cached
from causemesh.local.artefacts import Progress
from causemesh.local.ports import choose_ports
from causemesh.local.process import ServerProcess
from causemesh.local.servers import HOST


class Registry:
    """Apicurio Registry with its Confluent API, stored in an H2 file."""

    version = artefacts.REGISTRY[2]

    def __init__(self, home: Path, port: int, management_port: int) -> None:
        self.port = port
        data = home / "registry"
        data.mkdir(parents=True, exist_ok=True)
        environment = {
            "QUARKUS_HTTP_HOST": HOST,
            "QUARKUS_HTTP_PORT": str(port),
            "QUARKUS_MANAGEMENT_HOST": HOST,
            "QUARKUS_MANAGEMENT_PORT": str(management_port),
            "APICURIO_STORAGE_KIND": "sql",
            "APICURIO_STORAGE_SQL_KIND": "h2",
            "APICURIO_DATASOURCE_URL": f"jdbc:h2:file:{data.resolve()}/registry",
        }
        self.process = ServerProcess("registry", home, environment)

    def start(self, progress: Progress) -> None:
        """See `Server.start`."""
        artefacts.registry_home(progress)
        self.launch(progress, cached(self, progress))

    def elsewhere(self, home: Path) -> Registry:
        """See `JavaServer.elsewhere`."""
        ports = choose_ports(home / "ports.json", {"registry": 0, "registry_management": 0})
        return Registry(home, ports["registry"], ports["registry_management"])

    def launch(self, progress: Progress, flags: Sequence[str]) -> None:
        """See `JavaServer.launch`."""
        folder = artefacts.registry_home(progress)
        progress("registry", "starting")
        # It is asked once a schema and process, so what an optimising compiler costs never pays.
        plain = ("-Xmx256m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1")
        program = ("-jar", folder / "quarkus-run.jar")
        self.process.start([artefacts.java(), *flags, *plain, *program])
        self.process.wait_ready(self._answers, 90)

    def stop(self) -> None:
        """See `Server.stop`."""
        self.process.stop()

    def _answers(self) -> bool:
        try:
            answer = httpx.get(f"http://{HOST}:{self.port}/apis/ccompat/v7/subjects", timeout=2)
        except httpx.TransportError:
            return False
        return answer.status_code == 200
