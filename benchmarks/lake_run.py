"""The lake's writer, whole and as it ships, over what lies in a topic: prints what it took.

usage: python -m benchmarks.lake_run TOPIC RECORDS

Time is counted from the first snapshot's commit to the last one that came because there were enough
rows: what is left in the end waits for its time, which says nothing. Then the process is stopped as
a supervisor stops it, and commits the rest.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time

from benchmarks.service_run import At, peak_rss_mb
from causemesh import service
from services.features.lake import app, wiring
from services.features.lake.settings import LakeWriterSettings
from services.features.lake.sinks import Flushed, Sink
from services.features.lake.store import LakeStore


class TimedStore(LakeStore):
    """A store that notes when how many rows of a topic had their snapshot."""

    topic = ""
    records = 0
    began: At | None = None
    rows = snapshots = 0

    def _note(self, topic: str, sink: Sink, done: Flushed) -> None:
        super()._note(topic, sink, done)
        if topic != self.topic or sink.definition.aside or not done.rows:
            return
        self.rows += done.rows
        self.snapshots += 1
        now = At(self.rows, time.perf_counter(), time.process_time())
        if self.began is None:
            self.began = now
        elif self.records - self.rows < LakeWriterSettings().lake_commit_rows:
            self._tell(self.began, now)

    def _tell(self, began: At, ended: At) -> None:
        figures = {
            "records": ended.records - began.records,
            "seconds": ended.seconds - began.seconds,
            "cpu_seconds": ended.cpu_seconds - began.cpu_seconds,
            "snapshots": self.snapshots - 1,
            "peak_rss_mb": peak_rss_mb(),
        }
        self.records = -1  # told once
        print(json.dumps({"figures": figures}), flush=True)
        os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    """Run the writer until it has written all."""
    TimedStore.topic, TimedStore.records = sys.argv[1], int(sys.argv[2])
    setattr(wiring, "LakeStore", TimedStore)  # noqa: B010 - what it is to be made of
    service.run_process(app.main)


if __name__ == "__main__":
    main()
