"""One server process: started once, found again by another command, stopped by pid."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import structlog

from causemesh.errors import Fatal

_POLL_S = 0.1
_log = structlog.get_logger(__name__)
_LOG_LINES = 15


@dataclass
class ServerProcess:
    """A process with a pid file and a log under `home`.

    The pid file also holds the start time, so a pid that the system gave to a stranger later is
    never taken for ours.
    """

    name: str
    home: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    user: str | None = None
    nice: int = 0
    """How much of the processors it leaves to others, as of nice(2)."""

    @property
    def log(self) -> Path:
        """Standard output and error."""
        return self.home / "logs" / f"{self.name}.log"

    @property
    def _pid_file(self) -> Path:
        return self.home / "run" / f"{self.name}.json"

    def running(self) -> psutil.Process | None:
        """The live process, or None."""
        try:
            saved = json.loads(self._pid_file.read_text())
            process = psutil.Process(saved["pid"])
            same = abs(process.create_time() - saved["started"]) < 1.0
            alive = process.status() != psutil.STATUS_ZOMBIE
        except (FileNotFoundError, psutil.NoSuchProcess):
            return None
        return process if same and alive else None

    def start(self, argv: Sequence[str | Path]) -> None:
        """Start unless it runs."""
        if self.running() is not None:
            return
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._pid_file.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            child = subprocess.Popen(
                [str(part) for part in argv],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.environment},
                user=self.user,
                group=None if self.user is None else "nogroup",
                start_new_session=True,
            )
        started = psutil.Process(child.pid).create_time()
        if self.nice:
            self._give_way(child.pid)
        # From here on the pid file owns the process: without a return code the dropped handle would
        # warn that its child still runs.
        child.returncode = 0
        whole = self._pid_file.with_suffix(".new")  # another process may read it at any time
        whole.write_text(json.dumps({"pid": child.pid, "started": started}))
        whole.replace(self._pid_file)

    def _give_way(self, pid: int) -> None:
        psutil.Process(pid).nice(self.nice)
        group = Path(f"/proc/{pid}/autogroup")
        if group.exists():  # Linux weighs whole sessions, and each server has its own
            try:
                group.write_text(str(self.nice))
            except OSError as error:  # it takes a few a second from others than root
                _log.warning("server_keeps_its_weight", server=self.name, reason=repr(error))

    def wait_ready(self, ready: Callable[[], bool], timeout_s: float) -> None:
        """Wait for `ready`. Raises Fatal with the end of the log when it dies or takes too long."""
        deadline = time.monotonic() + timeout_s
        while not ready():
            if self.running() is None:
                raise Fatal(
                    f"{self.name} ended while starting; the end of {self.log}:\n{self.tail()}"
                )
            if time.monotonic() > deadline:
                raise Fatal(
                    f"{self.name} was not ready in {timeout_s:.0f} s; the end of {self.log}:\n"
                    f"{self.tail()}"
                )
            time.sleep(_POLL_S)

    def tail(self) -> str:
        """The last lines of the log."""
        lines = self.log.read_text(errors="replace").splitlines()
        return "\n".join(lines[-_LOG_LINES:])

    def stop(self, *, how: signal.Signals = signal.SIGTERM, timeout_s: float = 10.0) -> None:
        """Stop and wait; kill what does not stop in time."""
        process = self.running()
        if process is None:
            return
        process.send_signal(how)
        try:
            process.wait(timeout_s)
        except psutil.TimeoutExpired:
            process.kill()
            process.wait(timeout_s)
        self._pid_file.unlink(missing_ok=True)
