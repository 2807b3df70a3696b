"""Stripe's own stripe-mock, built once into the cache, and the stand-in beside it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from causemesh.local import artefacts
from causemesh.local.stripe import create_app, make_server

VERSION = "0.203.0"
_LISTENS = re.compile(r"HTTP at address: (127\.0\.0\.1:\d+)")
_BUILD_S = 280
_START_S = 20


@pytest.fixture(scope="session")
def stripe_mock() -> Path:
    """The program. Skipped only where it cannot be built: without Go and not yet in the cache."""
    program = artefacts.cache() / f"stripe-mock-{VERSION}"
    if program.exists():
        return program
    go = shutil.which("go")
    if go is None:
        pytest.skip(f"Go is not installed, so stripe-mock {VERSION} cannot be built")
    partial = program.with_name(f"{program.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    built = subprocess.run(
        [go, "install", f"github.com/stripe/stripe-mock@v{VERSION}"],
        env={**os.environ, "GOBIN": str(partial)},
        capture_output=True,
        text=True,
        check=False,
        timeout=_BUILD_S,
    )
    assert built.returncode == 0, f"stripe-mock was not built:\n{built.stderr}"
    (partial / "stripe-mock").replace(program)  # whole or not there, should two build at once
    partial.rmdir()
    return program


@pytest.fixture(scope="session")
def mock_url(stripe_mock: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """stripe-mock, running."""
    log = tmp_path_factory.mktemp("stripe-mock") / "log"
    # Without an address for HTTPS too it would listen on every interface.
    argv = [str(stripe_mock), "-http-addr", "127.0.0.1:0", "-https-addr", "127.0.0.1:0"]
    with log.open("wb") as output, subprocess.Popen(argv, stdout=output, stderr=output) as running:
        try:
            yield f"http://{_address(log, running)}"
        finally:
            running.kill()


def _address(log: Path, running: subprocess.Popen[bytes]) -> str:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline and running.poll() is None:
        listens = _LISTENS.search(log.read_text())
        if listens:
            return listens[1]
        time.sleep(0.05)
    raise AssertionError(f"stripe-mock did not start:\n{log.read_text()}")


@pytest.fixture(scope="session")
def standin_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The stand-in, running."""
    server = make_server(create_app(tmp_path_factory.mktemp("stripe") / "data.db"), 0)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the stand-in ended while starting"
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
