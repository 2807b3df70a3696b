"""How each server is set up, started and asked whether it works. All bind 127.0.0.1 only."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Protocol

from causemesh.catalogue import SERVICES
from causemesh.errors import Fatal
from causemesh.local import artefacts
from causemesh.local.artefacts import Progress
from causemesh.local.process import ServerProcess

HOST = "127.0.0.1"
_SESSIONS_END_S = 20.0
_STILL_IN_USE = "pre-existing shared memory block"


class Server(Protocol):
    """One kind of server."""

    process: ServerProcess
    port: int

    def start(self, progress: Progress) -> None:
        """Fetch, set up and start what is missing; returns when it works."""

    def stop(self) -> None:
        """Stop it with all its processes; its data stays."""


def port_open(port: int) -> bool:
    """Whether something on this machine accepts connections there."""
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex((HOST, port)) == 0


class Postgres:
    """Postgres with one database a service; only this machine can connect, without a password."""

    def __init__(self, home: Path, port: int) -> None:
        self.port = port
        self._data = home / "postgres"
        # Postgres refuses to run as root.
        user = "nobody" if os.geteuid() == 0 else None
        self.process = ServerProcess("postgres", home, user=user)

    def start(self, progress: Progress) -> None:
        """See `Server.start`."""
        programs = artefacts.postgres_bin()
        if not (self._data / "PG_VERSION").exists():
            progress("postgres", "creating its data folder")
            self._create(programs)
        progress("postgres", "starting")
        settings = {
            "listen_addresses": HOST,
            "port": self.port,
            "unix_socket_directories": "",
            "max_connections": 120,
            "shared_buffers": "128MB",
        }
        flags = [part for key, value in settings.items() for part in ("-c", f"{key}={value}")]
        self._start([programs / "postgres", "-D", self._data, *flags], programs)
        for service in SERVICES:
            self._ensure_database(programs, service)

    def _start(self, argv: list[str | Path], programs: Path) -> None:
        """Start, and again while sessions of a server that was killed are still ending."""
        deadline = time.monotonic() + _SESSIONS_END_S
        while True:
            self.process.start(argv)
            try:
                self.process.wait_ready(lambda: self._answers(programs), 30)
            except Fatal as error:
                if _STILL_IN_USE not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.2)
            else:
                return

    def stop(self) -> None:
        """See `Server.stop`."""
        # A fast shutdown: sessions end, data is flushed.
        self.process.stop(how=signal.SIGINT)

    def _create(self, programs: Path) -> None:
        shutil.rmtree(self._data, ignore_errors=True)
        self._data.mkdir(parents=True)
        self._data.chmod(0o700)
        if self.process.user is not None:
            shutil.chown(self._data, self.process.user, "nogroup")
        argv: list[str | Path] = [
            programs / "initdb",
            "-D",
            self._data,
            "-U",
            "causemesh",
            "-A",
            "trust",
        ]
        argv += ["-E", "UTF8", "--no-locale", "--no-instructions"]
        done = subprocess.run(
            argv, capture_output=True, text=True, check=False, user=self.process.user
        )
        if done.returncode:
            raise Fatal(f"Postgres could not create its data folder:\n{done.stdout}{done.stderr}")

    def _sql(self, programs: Path, statement: str) -> subprocess.CompletedProcess[str]:
        argv: list[str | Path] = [
            programs / "psql",
            "-h",
            HOST,
            "-p",
            str(self.port),
            "-U",
            "causemesh",
        ]
        argv += ["-d", "postgres", "-tAqc", statement]
        return subprocess.run(argv, capture_output=True, text=True, check=False)

    def _answers(self, programs: Path) -> bool:
        return self._sql(programs, "SELECT 1").stdout.strip() == "1"

    def _ensure_database(self, programs: Path, name: str) -> None:
        known = self._sql(programs, f"SELECT 1 FROM pg_database WHERE datname = '{name}'")
        if known.stdout.strip() != "1":
            done = self._sql(programs, f'CREATE DATABASE "{name}"')
            if done.returncode:
                raise Fatal(f"Postgres could not create database {name}: {done.stderr}")


class StripeStandIn:
    """Answers in Stripe's place while no Stripe key is set; its data is one SQLite file."""

    def __init__(self, home: Path, port: int) -> None:
        self.port = port
        self._data = home / "stripe" / "stripe.sqlite"
        self.process = ServerProcess("stripe", home)

    def start(self, progress: Progress) -> None:
        """See `Server.start`."""
        self._start(progress)

    def start_with_faults(self) -> None:
        """Start so that tests can order faults: see `causemesh.local.stripe.faults`."""
        self._start(lambda name, state: None, "--faults")

    def _start(self, progress: Progress, *more: str) -> None:
        progress("stripe", "starting")
        self._data.parent.mkdir(parents=True, exist_ok=True)
        argv: list[str | Path] = [sys.executable, "-m", "causemesh.local.stripe"]
        self.process.start([*argv, "--port", str(self.port), "--data", self._data, *more])
        self.process.wait_ready(lambda: port_open(self.port), 30)

    def stop(self) -> None:
        """See `Server.stop`."""
        self.process.stop()
