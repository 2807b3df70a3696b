"""Loaded by every Python process whose PYTHONPATH names this folder: services whose high-water
marks drop nothing. The control arm of the replay; nothing else may load it.

What features sent before a kill must matter when it is sent again, so its units count for
`worker.sent` only if they sent tasks: vectors may come twice without harm.
"""

import sys
from typing import Any

if any(argument.startswith("services.") for argument in sys.orig_argv):
    import numpy as np

    from causemesh.faultpoints import Point
    from causemesh.runner import worker
    from causemesh.runner.emitter import Emitter
    from causemesh.runner.marks import HighWaterMarks

    HighWaterMarks.fresh = lambda self, source, causes: np.ones(causes.height, dtype=bool)  # type: ignore[method-assign]

    _send, _reach, _sent = Emitter.send, worker.reach, [False]

    async def _sending(self: Emitter, outgoing: Any, *more: Any) -> Any:
        result = await _send(self, outgoing, *more)
        _sent[0] = any(part.topic.startswith("inference.tasks.") and len(part) for part in outgoing)
        return result

    def _reached(point: Point) -> None:
        if point is not Point.WORKER_SENT or _sent[0]:
            _reach(point)

    Emitter.send = _sending  # type: ignore[method-assign]
    worker.reach = _reached
