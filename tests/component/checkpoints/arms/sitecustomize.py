"""Loaded by every Python process whose PYTHONPATH names this folder: a features process that stops
itself before a commit of the joining stage, its files written, once the file that
CAUSEMESH_TEST_PAUSE names is there. CAUSEMESH_TEST_FENCE=off is the control arm: it then commits
under whatever claim is in force. Nothing else may load it."""

import os
import signal
import sys
from pathlib import Path

if "services.features.app" in sys.orig_argv:
    from causemesh import service
    from causemesh.positions_sql import _SqlUnit
    from causemesh.sql import open_engine
    from tests.chaos.pipeline import _Unfenced

    _commit = _SqlUnit.commit
    _flag = Path(os.environ["CAUSEMESH_TEST_PAUSE"])

    def _asked() -> bool:
        if not _flag.exists():
            return False
        _flag.unlink()
        return True

    async def _paused(self, checkpoint):  # type: ignore[no-untyped-def]
        if self._claim.group == "features" and _asked():
            os.kill(os.getpid(), signal.SIGSTOP)
        await _commit(self, checkpoint)

    _SqlUnit.commit = _paused  # type: ignore[method-assign]
    if os.environ["CAUSEMESH_TEST_FENCE"] == "off":
        service.SqlPositionStore = _Unfenced  # type: ignore[misc]
        # it reads the claim in force before it stops, and the server would end that transaction
        service.open_engine = lambda url, name, _, **pool: open_engine(url, name, 0, **pool)
