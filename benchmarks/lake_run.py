"""The lake's writer, whole and as it ships, over what lies in a topic: prints what it took.

usage: python -m benchmarks.lake_run TOPIC RECORDS LAST_POSITION

Time is counted from the first snapshot to the last one that came as there were enough rows:
what is left in the end waits for its time, which says nothing. Once all is read the process is
stopped as a supervisor stops it, and commits the rest.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time

from benchmarks.service_run import At, peak_rss_mb
from causemesh import service
from causemesh.positions import Checkpoint, Claim
from services.features.lake import app, wiring
from services.features.lake.settings import LakeWriterSettings
from services.features.lake.sinks import Flushed, Sink
from services.features.lake.store import LakeStore
from services.features.lake.writing import Written


class TimedStore(LakeStore):
    """A store that notes when how many rows of a topic had their snapshot."""

    topic = ""
    records = last_position = 0
    began: At | None = None
    rows = snapshots = 0
    told = False

    def stage(self, claim: Claim, written: Written, checkpoint: Checkpoint) -> None:
        """See `LakeStore.stage`."""
        super().stage(claim, written, checkpoint)
        self._stop_at_the_end()

    def _note(self, topic: str, sink: Sink, done: Flushed) -> None:
        super()._note(topic, sink, done)
        if topic != self.topic or sink.definition.aside or not done.rows:
            return
        self.rows += done.rows
        self.snapshots += 1
        now = At(self.rows, time.perf_counter(), time.process_time())
        if self.began is None:
            self.began = now
        elif not self.told and self.records - self.rows < LakeWriterSettings().lake_commit_rows:
            self._tell(self.began, now)
        self._stop_at_the_end()

    def _stop_at_the_end(self) -> None:
        if self.told and self._staged[(self.topic, 0)] >= self.last_position:
            os.kill(os.getpid(), signal.SIGTERM)

    def _tell(self, began: At, ended: At) -> None:
        figures = {
            "records": ended.records - began.records,
            "seconds": ended.seconds - began.seconds,
            "cpu_seconds": ended.cpu_seconds - began.cpu_seconds,
            "snapshots": self.snapshots - 1,
            "peak_rss_mb": peak_rss_mb(),
        }
        self.told = True
        print(json.dumps({"figures": figures}), flush=True)


def main() -> None:
    """Run the writer until it has written all."""
    TimedStore.topic, *numbers = sys.argv[1:]
    TimedStore.records, TimedStore.last_position = map(int, numbers)
    setattr(wiring, "LakeStore", TimedStore)  # noqa: B010 - what it is to be made of
    service.run_process(app.main)


if __name__ == "__main__":
    main()
