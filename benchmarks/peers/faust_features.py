"""Faust (faust-streaming): count and sum by key in a tumbling window of one hour.

usage: python faust_features.py BOOTSTRAP TOPIC SCHEMA_FILE SCHEMA_ID RECORDS WARM STATE_FOLDER

Prints one JSON object. The table is in memory with a changelog topic, as Faust comes.
"""

from __future__ import annotations

import io
import json
import os
import re
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import fastavro
import faust


def peak_rss_mb() -> float:
    """Most memory of this process so far; getrusage would count what its parent had at the fork."""
    told = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(told[1]) / 1000 if told else 0.0


def main() -> None:
    """Read until all records were counted."""
    bootstrap, topic_name, schema_file, schema_id, records, warm, folder = sys.argv[1:]
    expected, start_at = int(records), int(warm)
    with open(schema_file) as file:
        schema = fastavro.parse_schema(json.load(file))
    header = b"\0" + int(schema_id).to_bytes(4, "big")

    class Framed(faust.Codec):
        """Framed Avro; None for records of another schema."""

        def _loads(self, s: bytes) -> Any:
            if s[:5] != header:
                return None
            return fastavro.schemaless_reader(io.BytesIO(s[5:]), schema)

    faust.serializers.codecs.register("reading", Framed())
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
    topic = app.topic(topic_name, key_type=str, value_serializer="reading")
    table = (
        app.Table("totals", default=lambda: [0, 0.0], partitions=1)
        .tumbling(timedelta(hours=1))
        .relative_to(lambda event: event.value["occurred_at"].timestamp())
    )
    seen = 0
    began = (0.0, 0.0)

    def tell() -> None:
        ended = (time.perf_counter(), time.process_time())
        totals = list(table.table.data.values())
        figures = {
            "records": expected - start_at,
            "seconds": ended[0] - began[0],
            "cpu_seconds": ended[1] - began[1],
            "count": sum(count for count, _ in totals),
            "sum": sum(total for _, total in totals),
            "peak_rss_mb": peak_rss_mb(),
        }
        print(json.dumps({"figures": figures}), file=sys.__stdout__, flush=True)  # not the log
        os._exit(0)  # an orderly stop waits for the group, and nothing of it is measured

    @app.agent(topic)
    async def count(stream: Any) -> None:
        nonlocal seen, began
        async for event in stream.events():
            if event.value is None:
                continue
            number, total = table[event.key].value()
            table[event.key] = [number + 1, total + event.value["value"]]
            seen += 1
            if seen == start_at:
                began = (time.perf_counter(), time.process_time())
            if seen == expected:
                tell()

    faust.Worker(app, loglevel="warning").execute_from_commandline()


if __name__ == "__main__":
    main()
