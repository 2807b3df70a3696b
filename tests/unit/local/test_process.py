"""A process and its pid file, which others read at any time."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from causemesh.local.process import ServerProcess


def test_who_looks_while_the_pid_file_is_written_finds_a_whole_one_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, seen = ServerProcess("one", tmp_path), ServerProcess("one", tmp_path)
    write, looks = Path.write_text, []

    def slowly(self: Path, text: str, *more: Any) -> int:
        write(self, text[:5])
        looks.append(seen.running())
        return write(self, text, *more)

    monkeypatch.setattr(Path, "write_text", slowly)
    ours.start([sys.executable, "-c", "import time; time.sleep(60)"])
    assert looks == [None]
    found = seen.running()
    assert found is not None
    ours.stop(how=signal.SIGKILL)
    assert seen.running() is None
    assert not list((tmp_path / "run").iterdir())


def test_a_process_gives_way_as_it_is_told(tmp_path: Path) -> None:
    """The scheduler of Linux weighs sessions first, so within its own a niceness means nothing."""
    server = ServerProcess("one", tmp_path, nice=3)
    server.start([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        process = server.running()
        assert process is not None
        assert process.nice() == 3
        group = Path(f"/proc/{process.pid}/autogroup")
        assert not group.exists() or group.read_text().endswith(" nice 3\n")
    finally:
        server.stop()
