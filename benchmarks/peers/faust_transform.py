"""Faust (faust-streaming) alone: the agent and the table of `transforms_vs_faust`, as Faust comes.

usage: python faust_transform.py BOOTSTRAP TOPIC READING_FILE READING_ID OUTPUT_FILE OUTPUT_TOPIC
       EVENTS REGROUP STATE_FOLDER

Prints one JSON object. REGROUP 1 brings the events together by their key on a topic of its own
first, as one must where they lie by another key.
"""

from __future__ import annotations

import io
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import fastavro
import faust


def peak_rss_mb() -> float:
    """Most memory of this process so far; getrusage would count what its parent had at the fork."""
    told = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(told[1]) / 1000 if told else 0.0


class Avro(faust.Codec):
    """Avro behind a header; records with another header are None."""

    def __init__(self, schema_file: str, header: bytes = b"") -> None:
        super().__init__()
        self._schema = fastavro.parse_schema(json.loads(Path(schema_file).read_text()))
        self._header = header

    def _loads(self, s: bytes) -> Any:
        if not s.startswith(self._header):
            return None
        return fastavro.schemaless_reader(io.BytesIO(s[len(self._header) :]), self._schema)

    def _dumps(self, obj: Any) -> bytes:
        written = io.BytesIO()
        fastavro.schemaless_writer(written, self._schema, obj)
        return self._header + written.getvalue()


class Totals:
    """The agent: count and total by key, and an event of each."""

    def __init__(self, app: faust.App, output: Any, expected: int) -> None:
        self._app = app
        self._output = output
        self._expected = expected
        self._table = app.Table("totals", partitions=1)
        self._seen = 0
        self._began: tuple[float, float] | None = None

    def begin(self) -> None:
        """The first event was taken."""
        if self._began is None:
            self._began = (time.perf_counter(), time.process_time())

    async def count(self, stream: Any) -> None:
        """One event after another."""
        await self._output.maybe_declare()  # the broker makes no topic by itself
        async for event in stream.events():
            self.begin()
            if event.value is None:
                continue
            held = self._table.get(event.key) or {"count": 0, "total": 0.0}
            kept = {"count": held["count"] + 1, "total": held["total"] + event.value["value"]}
            self._table[event.key] = kept
            await self._output.send(key=event.key, value={"sensor": event.key, **kept})
            self._seen += 1
            if self._seen == self._expected:
                await self._tell()

    async def _tell(self) -> None:
        await self._app.producer.flush()
        seconds, cpu_seconds = time.perf_counter(), time.process_time()
        began = self._began or (seconds, cpu_seconds)
        kept = list(self._table.data.values())
        figures = {
            "records": self._seen,
            "seconds": seconds - began[0],
            "cpu_seconds": cpu_seconds - began[1],
            "peak_rss_mb": peak_rss_mb(),
            "count": sum(one["count"] for one in kept),
            "sum": sum(one["total"] for one in kept),
        }
        print(json.dumps({"figures": figures}), file=sys.__stdout__, flush=True)  # not the log
        os._exit(0)  # an orderly stop waits for the group, and nothing of it is measured


def main() -> None:
    """Read until all events are worked off, and what was sent is acknowledged."""
    bootstrap, topic_name, reading_file, reading_id, output_file, output_name = sys.argv[1:7]
    expected, regroup, folder = int(sys.argv[7]), sys.argv[8] == "1", sys.argv[9]
    header = b"\0" + int(reading_id).to_bytes(4, "big")
    faust.serializers.codecs.register("reading", Avro(reading_file, header))
    faust.serializers.codecs.register("totalled", Avro(output_file))
    app = faust.App(
        f"faust-{time.time_ns()}",
        broker=f"kafka://{bootstrap}",
        store="memory://",
        topic_partitions=1,
        datadir=folder,
        web_enabled=False,
        producer_compression_type="lz4",
        consumer_auto_offset_reset="earliest",
    )
    readings = {"key_type": str, "value_serializer": "reading", "partitions": 1}
    topic = app.topic(topic_name, **readings)
    output = app.topic(output_name, key_type=str, value_serializer="totalled", partitions=1)
    totals = Totals(app, output, expected)
    feed = app.topic(f"{output_name}-by-sensor", internal=True, **readings)

    async def bring(stream: Any) -> None:
        await feed.maybe_declare()
        async for event in stream.events():
            totals.begin()
            if event.value is not None:
                await feed.send(key=event.value["sensor"], value=event.value)

    async def count(stream: Any) -> None:
        await totals.count(stream)

    if regroup:
        app.agent(topic)(bring)
    app.agent(feed if regroup else topic)(count)
    faust.Worker(app, loglevel="warning").execute_from_commandline()


if __name__ == "__main__":
    main()
