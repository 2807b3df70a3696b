"""A one-node Pulsar, and its quirks at the start."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx

from causemesh.errors import Fatal, Misdeclared
from causemesh.local import artefacts
from causemesh.local.aot import cached
from causemesh.local.artefacts import Progress
from causemesh.local.ports import choose_ports
from causemesh.local.process import ServerProcess
from causemesh.local.servers import HOST

_START_S = 120.0
_USABLE_S = 20.0
_PROBE = "causemesh.probe"
_OPENED = (
    "java.base/sun.net",
    "java.base/java.lang",
    "java.base/java.io",
    "java.base/java.nio",
    "java.base/java.util.zip",
    "java.base/jdk.internal.misc",
    "java.base/jdk.internal.platform",
    "java.management/sun.management",
    "jdk.management/com.sun.management.internal",
)


class Pulsar:
    """Pulsar's broker, bookie and metadata in one process.

    After a kill -9 it can say that it is healthy and refuse all work until it is started once more.
    So it is ready when a record was written and read again, and is restarted once before it fails.
    """

    version = artefacts.PULSAR[2]

    def __init__(self, home: Path, port: int, web_port: int, bookie_port: int) -> None:
        self.port = port
        self._web_port = web_port
        self._bookie_port = bookie_port
        self._data = home.resolve() / "pulsar"
        self.process = ServerProcess("pulsar", home)

    def start(self, progress: Progress) -> None:
        """See `Server.start`."""
        artefacts.pulsar_home(progress)
        self.launch(progress, cached(self, progress))

    def elsewhere(self, home: Path) -> Pulsar:
        """See `JavaServer.elsewhere`."""
        names = ("pulsar", "pulsar_web", "pulsar_bookie")
        ports = choose_ports(home / "ports.json", dict.fromkeys(names, 0))
        return Pulsar(home, *(ports[name] for name in names))

    def launch(self, progress: Progress, flags: Sequence[str]) -> None:
        """See `JavaServer.launch`."""
        folder = artefacts.pulsar_home(progress)
        running = self.process.running() is not None
        progress("pulsar", "starting")
        self._launch(folder, flags)
        if self._usable():
            return
        progress("pulsar", "healthy but unusable: starting it once more")
        self.process.stop(timeout_s=20.0)
        self._launch(folder, flags)
        if not self._usable():
            again = "" if running else " twice"
            raise Fatal(f"pulsar started{again} and took no record:\n{self.process.tail()}")

    def stop(self) -> None:
        """See `Server.stop`."""
        self.process.stop(timeout_s=20.0)

    def _launch(self, folder: Path, flags: Sequence[str]) -> None:
        self.process.start(self._argv(folder, self._settings(folder), flags))
        self.process.wait_ready(self._healthy, _START_S)

    def _argv(self, folder: Path, settings: Path, flags: Sequence[str]) -> list[str | Path]:
        opened = [flag for one in _OPENED for flag in ("--add-opens", f"{one}=ALL-UNNAMED")]
        heap = ["-Xms256m", "-Xmx512m", "-XX:MaxDirectMemorySize=512m", "-XX:+UseG1GC"]
        logging = {
            "log4j2.configurationFile": folder / "conf" / "log4j2.yaml",
            "pulsar.log.appender": "Console",
            "pulsar.routing.appender.default": "Console",
            "pulsar.log.level": "warn",
            "pulsar.log.root.level": "warn",
            "pulsar.log.dir": self._data / "logs",
        }
        return [
            artefacts.java(),
            *flags,
            *heap,
            *opened,
            "-Dio.netty.tryReflectionSetAccessible=true",
            *(f"-D{name}={value}" for name, value in logging.items()),
            # Jars alone: Java keeps no AOT cache for a class path with folders.
            *("-cp", ":".join(map(str, sorted((folder / "lib").glob("*.jar"))))),
            "org.apache.pulsar.PulsarStandaloneStarter",
            *("--config", settings, "--no-functions-worker", "--no-stream-storage"),
            *("--metadata-dir", self._data / "metadata"),
            *("--bookkeeper-dir", self._data / "bookkeeper"),
            *("--bookkeeper-port", str(self._bookie_port), "--advertised-address", HOST),
        ]

    def _settings(self, folder: Path) -> Path:
        """Pulsar's own standalone.conf with what differs here."""
        ours = {
            "bindAddress": HOST,
            "advertisedAddress": HOST,
            "listeningInterface": "lo",
            "allowLoopback": "true",
            "brokerServicePort": self.port,
            "webServicePort": self._web_port,
            "brokerDeduplicationEnabled": "true",
            "managedLedgerNewEntriesCheckDelayInMillis": 0,
            "transactionCoordinatorEnabled": "false",
            "allowAutoTopicCreation": "false",
            # Each topic is kept as long as the catalogue says; the policies lie in a system topic.
            "systemTopicEnabled": "true",
            "topicLevelPoliciesEnabled": "true",
            # Readers hold no subscription, so retention alone keeps the data.
            "brokerDeleteInactiveTopicsEnabled": "false",
            "defaultRetentionTimeInMinutes": -1,
            "defaultRetentionSizeInMB": -1,
            # How soon a paused member's partitions go to another, as Kafka's session timeout.
            "keepAliveIntervalSeconds": 3,
            "activeConsumerFailoverDelayTimeMillis": 0,
        }
        theirs = (folder / "conf" / "standalone.conf").read_text().splitlines()
        kept = [line for line in theirs if line.split("=")[0].strip() not in ours]
        self._data.mkdir(parents=True, exist_ok=True)
        path = self._data / "standalone.conf"
        path.write_text("\n".join([*kept, *(f"{key}={value}" for key, value in ours.items()), ""]))
        return path

    def _healthy(self) -> bool:
        url = f"http://{HOST}:{self._web_port}/admin/v2/namespaces/public/default"
        try:
            return httpx.get(url, timeout=2.0).status_code == 200
        except httpx.TransportError:
            return False

    def _usable(self) -> bool:
        """Whether a record can be written and read again, within `_USABLE_S`."""
        deadline = time.monotonic() + _USABLE_S
        while time.monotonic() < deadline:
            if self.process.running() is None:
                return False
            if self._probed():
                return True
            time.sleep(0.5)
        return False

    def _probed(self) -> bool:
        try:
            # Only this server needs the extra.
            import pulsar  # type: ignore[import-untyped] # noqa: PLC0415
        except ImportError as error:
            raise Misdeclared("the embedded Pulsar needs the extra: causemesh[pulsar]") from error
        topic = f"http://{HOST}:{self._web_port}/admin/v2/persistent/public/default/{_PROBE}"
        client = pulsar.Client(
            f"pulsar://{HOST}:{self.port}",
            operation_timeout_seconds=5,
            logger=pulsar.FileLogger(pulsar.LoggerLevel.Error, os.devnull),  # its errors are raised
        )
        try:
            httpx.put(topic, timeout=5.0)  # it may exist from before
            return _echoed(pulsar, client)
        except (pulsar.PulsarException, httpx.TransportError):
            return False
        finally:
            with suppress(pulsar.PulsarException):
                client.close()


def _echoed(pulsar: Any, client: Any) -> bool:
    said = uuid.uuid4().bytes
    reader = client.create_reader(_PROBE, pulsar.MessageId.latest)
    client.create_producer(_PROBE, send_timeout_millis=5_000).send(said)
    return bool(reader.read_next(5_000).data() == said)
