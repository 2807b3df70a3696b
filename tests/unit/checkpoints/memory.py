"""Files of checkpoints in memory, slow or failing where a test wants it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from causemesh.errors import Retryable


class MemoryFiles:
    """See `CheckpointFiles`. `fails` is asked before each write."""

    def __init__(self, *, slow_s: float = 0.0, fails: Callable[[], bool] = lambda: False) -> None:
        self.root = "memory://"
        self.kept: dict[str, bytes] = {}
        self.slow_s = slow_s
        self._fails = fails

    def write(self, name: str, content: bytes) -> None:
        time.sleep(self.slow_s)
        if self._fails():
            raise Retryable("the storage is away", retry_after=0.0)
        assert self.kept.get(name, content) == content, f"{name} was changed"
        self.kept[name] = content

    def read(self, name: str) -> bytes:
        if name not in self.kept:
            raise FileNotFoundError(name)
        return self.kept[name]

    def delete(self, name: str) -> None:
        self.kept.pop(name, None)

    def list(self, folder: str) -> Sequence[str]:
        return [name for name in self.kept if name.startswith(f"{folder}/")]
