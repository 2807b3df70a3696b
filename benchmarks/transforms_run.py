"""The process of the transforms, whole and as it ships, over what lies in a topic.

usage: python -m benchmarks.transforms_run EVENTS

CAUSEMESH_* say where it works. Time is counted from the first event that it takes off the topic, on
its way to the feed, until the last one is stored: its output and its table are acknowledged. Then
it is stopped as a supervisor stops it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.service_run import At, peak_rss_mb
from causemesh import service
from causemesh.runner import Batch, Emission
from services.features.transforms import app
from services.features.transforms.applying import Applied
from services.features.transforms.feed import Feed
from services.features.transforms.worker import TransformWorker


class TimedFeed(Feed):
    """Notes when it took the first event."""

    began: At | None = None

    async def process(
        self, batches: Sequence[Batch], watermark_us: int, transaction: Any
    ) -> Emission:
        """See `Processor.process`."""
        if TimedFeed.began is None:
            TimedFeed.began = At(0, time.perf_counter(), time.process_time())
        return await super().process(batches, watermark_us, transaction)


class TimedWorker(TransformWorker):
    """Tells what it took once so many events are stored."""

    wanted = 0
    stored = 0

    def _note(self, done: Applied, events: int) -> None:
        super()._note(done, events)
        self.stored += events - done.replays
        if self.stored >= self.wanted and TimedFeed.began is not None:
            began = TimedFeed.began
            figures = {
                "records": self.stored,
                "seconds": time.perf_counter() - began.seconds,
                "cpu_seconds": time.process_time() - began.cpu_seconds,
                "peak_rss_mb": peak_rss_mb(),
            }
            print(json.dumps({"figures": figures}), flush=True)
            os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    """Run until all is stored."""
    TimedWorker.wanted = int(sys.argv[1])
    setattr(app, "Feed", TimedFeed)  # noqa: B010 - what it is to be made of
    setattr(app, "TransformWorker", TimedWorker)  # noqa: B010
    service.run_process(app.main_and_end)


if __name__ == "__main__":
    main()
