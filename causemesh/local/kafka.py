"""A one-node Kafka."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from causemesh.errors import Fatal
from causemesh.local import artefacts
from causemesh.local.aot import cached
from causemesh.local.artefacts import Progress
from causemesh.local.ports import choose_ports
from causemesh.local.process import ServerProcess
from causemesh.local.servers import HOST, port_open

_LOG = {
    "defaultLogLevel": "warn",
    "showDateTime": "true",
    "dateTimeFormat": "yyyy-MM-dd'T'HH:mm:ss.SSSXXX",
    "showShortLogName": "true",
}


class Kafka:
    """A one-node Kafka in KRaft mode."""

    version = "-".join(part.rsplit(":", 1)[-1] for part in (artefacts.KAFKA, artefacts.KAFKA_LOG))

    def __init__(self, home: Path, port: int, controller_port: int) -> None:
        self.port = port
        self._controller_port = controller_port
        self._data = home / "kafka"
        self.process = ServerProcess("kafka", home)

    def start(self, progress: Progress) -> None:
        """See `Server.start`."""
        artefacts.kafka_jars(progress)
        self.launch(progress, cached(self, progress))

    def elsewhere(self, home: Path) -> Kafka:
        """See `JavaServer.elsewhere`."""
        ports = choose_ports(home / "ports.json", {"kafka": 0, "kafka_controller": 0})
        return Kafka(home, ports["kafka"], ports["kafka_controller"])

    def launch(self, progress: Progress, flags: Sequence[str]) -> None:
        """See `JavaServer.launch`."""
        jars = ("-cp", ":".join(map(str, artefacts.kafka_jars(progress))))
        settings = self._settings()
        if not (self._data / "log" / "meta.properties").exists():
            progress("kafka", "formatting its storage")
            self._format(jars, settings)
        progress("kafka", "starting")
        # The optimising compiler would take half of Kafka's processor time in its first minutes,
        # from the cores that the services share with it (4.2 s instead of 9.0 for a month of
        # flights), and a collector with threads of its own more.
        heap = ("-Xmx512m", "-Xms256m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1")
        logs = tuple(f"-Dorg.slf4j.simpleLogger.{key}={value}" for key, value in _LOG.items())
        self.process.start([artefacts.java(), *flags, *heap, *logs, *jars, "kafka.Kafka", settings])
        self.process.wait_ready(lambda: port_open(self.port), 60)

    def stop(self) -> None:
        """See `Server.stop`."""
        self.process.stop()

    def _format(self, jars: Sequence[str], settings: Path) -> None:
        plain = ("-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1")
        tool = ("kafka.tools.StorageTool", "format", "-t", "Y2F1c2VtZXNoLWxvY2FsMA", "-c", settings)
        argv: list[str | Path] = [artefacts.java(), *plain, *jars, *tool]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Fatal(f"Kafka's storage could not be formatted:\n{done.stdout}{done.stderr}")

    def _settings(self) -> Path:
        settings = {
            "process.roles": "broker,controller",
            "node.id": 1,
            "controller.quorum.voters": f"1@{HOST}:{self._controller_port}",
            "listeners": f"PLAINTEXT://{HOST}:{self.port},CONTROLLER://{HOST}:{self._controller_port}",
            "advertised.listeners": f"PLAINTEXT://{HOST}:{self.port}",
            "controller.listener.names": "CONTROLLER",
            "listener.security.protocol.map": "CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT",
            "log.dirs": self._data / "log",
            "auto.create.topics.enable": "false",
            "offsets.topic.num.partitions": 4,
            "offsets.topic.replication.factor": 1,
            "transaction.state.log.replication.factor": 1,
            "transaction.state.log.min.isr": 1,
            "share.coordinator.state.topic.replication.factor": 1,
            "share.coordinator.state.topic.min.isr": 1,
            "default.replication.factor": 1,
            "message.max.bytes": 2 << 20,
            "group.initial.rebalance.delay.ms": 0,
            "group.min.session.timeout.ms": 1000,
            # After a kill -9 the controller refuses the broker's new registration for so long. Much
            # less, and a machine with too much to do takes its only broker for dead.
            "broker.session.timeout.ms": 3000,
            "broker.heartbeat.interval.ms": 400,
        }
        self._data.mkdir(parents=True, exist_ok=True)
        path = self._data / "server.properties"
        path.write_text("".join(f"{key}={value}\n" for key, value in settings.items()))
        return path
