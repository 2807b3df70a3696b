"""A service as a process: it says when it is ready, ends on a signal, and says why it failed.

Run as a script, this file is such a service: one stage on a topic of its own, in a database of its
own.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from fastapi import APIRouter
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from causemesh.bus.base import Outbound
from causemesh.bus.kafka import KafkaBus
from causemesh.catalogue import DEADLETTERS, Catalogue
from causemesh.codec.registry import HttpRegistry
from causemesh.errors import Misdeclared
from causemesh.local import Endpoints
from causemesh.runner import Batch, Emission, Stage
from causemesh.service import Service, run_process
from causemesh.settings import ServiceSettings
from causemesh.telemetry import configure_logging

pytestmark = pytest.mark.servers
ROOT = Path(__file__).parents[3]
TOKEN = "a-token-for-the-process-test"
AUTHORISED = {"Authorization": f"Bearer {TOKEN}"}
UNIT_S = 0.7
EFFECTS = sa.text("CREATE TABLE effects (position bigint)")
INSERT = sa.text("INSERT INTO effects VALUES (:position)")


class Slow:
    """Writes the position of every bad row, and takes its time."""

    takes_bad_rows = True
    stateful = False

    async def process(self, batches: Sequence[Batch], watermark_us: int, tx: Any) -> Emission:
        for batch in batches:
            rows = batch.raw.positions[sorted(batch.bad)].tolist()
            await tx.execute(INSERT, [{"position": position} for position in rows])
            print(json.dumps({"event": "unit_begun"}), flush=True)
            await asyncio.sleep(UNIT_S)
        return Emission()

    def snapshot(self) -> bytes | None:
        return None

    def restore(self, state: bytes | None) -> None:
        """No state."""


def catalogue(inbox: str) -> Catalogue:
    core = Catalogue.load()
    own = replace(core.topic("inbox.requests"), name=inbox, sources=(inbox,), partitions=1)
    return Catalogue({inbox: own, DEADLETTERS: core.topic(DEADLETTERS)}, {}, core.controls)


async def serve(inbox: str, reads: str, how: str) -> None:
    """The service's process."""
    settings = ServiceSettings()
    configure_logging("ingest")
    service = Service(
        "ingest",
        settings,
        catalogue=catalogue(inbox),
        bus=KafkaBus(settings.kafka_bootstrap),
        registry=HttpRegistry(settings.registry_url),
        engine=create_async_engine(settings.postgres_url),
    )

    async def fails() -> None:
        await asyncio.sleep(0.2)
        raise Misdeclared("the terms changed; set CAUSEMESH_TERMS to accept them")

    routes = APIRouter()

    @routes.get("/here")
    async def here() -> dict[str, bool]:
        return {"here": True}

    try:
        service.runner(Stage("ingest", f"kit-{inbox}", (reads,)), lambda _: Slow())
        await service.serve([routes], [fails] if how == "fails" else [])
    finally:
        await service.close()


@dataclass
class Process:
    """A running service."""

    child: subprocess.Popen[bytes]
    port: int
    log: Path

    def get(self, path: str, **more: Any) -> httpx.Response:
        return httpx.get(f"http://127.0.0.1:{self.port}{path}", timeout=5.0, **more)

    def ready(self) -> dict[str, Any]:
        """Wait until it can do its work."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            assert self.child.poll() is None, self.log.read_text()[-3000:]
            with suppress(httpx.TransportError):
                answer = self.get("/ready")
                if answer.status_code == 200:
                    return dict(answer.json())
            time.sleep(0.1)
        raise TimeoutError(self.log.read_text()[-3000:])

    def seen(self, event: str) -> None:
        deadline = time.monotonic() + 60
        while event not in self.log.read_text():
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.02)

    def ended(self, number: signal.Signals | None = None) -> tuple[int, float]:
        """Exit status, and seconds from the signal to the end."""
        if number is not None:
            self.child.send_signal(number)
        began = time.monotonic()
        status = self.child.wait(60)
        return status, time.monotonic() - began

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]


@dataclass
class Place:
    """Where processes of a test run: a topic and a database."""

    cluster: Endpoints
    inbox: str
    database: AsyncEngine
    folder: Path

    @contextmanager
    def process(self, reads: str = "", how: str = "", port: int = 0) -> Iterator[Process]:
        if not port:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
        log = self.folder / f"{uuid.uuid4().hex}.log"
        environment = {
            **os.environ,
            **self.cluster.environment(),
            "CAUSEMESH_POSTGRES_URL": self.database.url.render_as_string(hide_password=False),
            "CAUSEMESH_API_TOKEN": TOKEN,
            "CAUSEMESH_API_PORT": str(port),
        }
        command = [sys.executable, __file__, self.inbox, reads or self.inbox, how]
        with log.open("wb") as out:
            child = subprocess.Popen(
                command, env=environment, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT
            )
        try:
            yield Process(child, port, log)
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()

    async def send(self, count: int) -> None:
        bus = KafkaBus(self.cluster.kafka_bootstrap)
        producer = bus.producer("outside")
        await producer.send([Outbound(self.inbox, 0, [None] * count, [b"{}"] * count)])
        await producer.close()
        await bus.close()

    async def effects(self) -> list[int]:
        async with self.database.connect() as connection:
            rows = await connection.execute(sa.text("SELECT position FROM effects"))
            return sorted(row[0] for row in rows)


@pytest.fixture
async def place(cluster: Endpoints, database: AsyncEngine, tmp_path: Path) -> Place:
    async with database.begin() as connection:
        await connection.execute(EFFECTS)
    return Place(cluster, f"inbox.t{uuid.uuid4().hex}", database, tmp_path)


async def test_it_answers_and_on_a_signal_finishes_its_unit(place: Place) -> None:
    with place.process() as process:
        assert process.ready() == {"service": "ingest", "ready": True, "missing": {}}
        assert process.get("/health").json()["status"] == "ok"
        assert "causemesh_lag_records" in process.get("/metrics").text
        assert process.get("/v1/here").status_code == 401
        assert process.get("/v1/here", headers=AUTHORISED).json() == {"here": True}
        await place.send(5)
        process.seen("unit_begun")
        assert await place.effects() == []
        status, seconds = process.ended(signal.SIGTERM)
        assert status == 0
        assert seconds < 5
        lines = process.lines()
    assert await place.effects() == list(range(5))
    assert [line["event"] for line in lines] == ["service_started", "unit_begun", "service_stopped"]
    assert lines[0]["service"] == "ingest"
    assert lines[-1]["failures"] == []


def failure(process: Process) -> str:
    """Why a process ended, from the one line that says so."""
    assert "Traceback" not in process.log.read_text()
    (line,) = [line for line in process.lines() if line["event"] == "service_failed"]
    assert line["level"] == "error"
    return str(line["reason"])


async def test_an_undeclared_topic_ends_it_with_a_clear_line(place: Place) -> None:
    with place.process(reads="inbox.elsewhere") as process:
        assert process.ended()[0] == 1
        why = failure(process)
    assert why.startswith("topic 'inbox.elsewhere' is not in the catalogue; declare it in")


async def test_a_misdeclared_task_ends_what_ran_well(place: Place) -> None:
    with place.process(how="fails") as process:
        assert process.ended()[0] == 1
        assert failure(process).startswith("the terms changed; set CAUSEMESH_TERMS")


async def test_a_taken_port_is_said(place: Place) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with place.process(port=taken.getsockname()[1]) as process:
            assert process.ended()[0] == 1
            assert "address already in use" in process.log.read_text()
            assert "set CAUSEMESH_API_PORT to a free port" in failure(process)


def test_a_service_without_a_token_ends_before_it_connects() -> None:
    environment = {key: value for key, value in os.environ.items() if "CAUSEMESH_" not in key}
    environment["CAUSEMESH_PROJECT"] = str(ROOT / "tests" / "project")
    environment["CAUSEMESH_POSTGRES_URL"] = "postgresql+asyncpg://nobody@127.0.0.1:1"
    command = [sys.executable, "-m", "services.ingest.app"]
    ended = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 1
    assert ended.stderr == ""
    (line,) = ended.stdout.splitlines()
    assert "CAUSEMESH_API_TOKEN must be set" in json.loads(line)["reason"]


if __name__ == "__main__":
    run_process(lambda: serve(*sys.argv[1:4]))
