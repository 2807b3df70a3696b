"""Faust (faust-streaming): eight aggregates by key in tumbling windows of one, two and three hours.

usage: python faust_windows.py BOOTSTRAP TOPIC SCHEMA_FILE SCHEMA_ID RECORDS WARM STATE_FOLDER
RESULT

Prints one JSON object and writes the windows that the last record is in. The tables are in memory
with changelog topics, as Faust comes.
"""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta
from typing import Any

import faust
import windowed


def main() -> None:
    """Read until all records were counted."""
    bootstrap, topic_name, schema_file, schema_id, records, warm, folder, result = sys.argv[1:]
    expected, start_at = int(records), int(warm)
    read = windowed.reader(schema_file, schema_id)

    class Framed(faust.Codec):
        """Framed Avro; None for records of another schema."""

        def _loads(self, s: bytes) -> Any:
            return read(s)

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
    tables = {
        hours: app.Table(f"totals_{hours}h", default=windowed.nothing, partitions=1)
        .tumbling(timedelta(hours=hours))
        .relative_to(lambda event: event.value["occurred_at"].timestamp())
        for hours in windowed.HOURS
    }
    seen = 0
    began = (0.0, 0.0)

    def tell() -> None:
        ended = (time.perf_counter(), time.process_time())
        newest: dict[int, Any] = {}
        for hours, table in tables.items():
            held = table.table.data
            last = max(start for _, (start, _) in held)
            newest[hours] = [(key, one) for (key, (start, _)), one in held.items() if start == last]
        windowed.write_results(result, newest)
        figures = {
            "records": expected - start_at,
            "seconds": ended[0] - began[0],
            "cpu_seconds": ended[1] - began[1],
            "peak_rss_mb": windowed.peak_rss_mb(),
        }
        print(json.dumps({"figures": figures}), file=sys.__stdout__, flush=True)  # not the log
        os._exit(0)  # an orderly stop waits for the group, and nothing of it is measured

    @app.agent(topic)
    async def count(stream: Any) -> None:
        nonlocal seen, began
        async for event in stream.events():
            if event.value is None:
                continue
            value = event.value["value"]
            for table in tables.values():
                table[event.key] = windowed.added(table[event.key].value(), value)
            seen += 1
            if seen == start_at:
                began = (time.perf_counter(), time.process_time())
            if seen == expected:
                tell()

    faust.Worker(app, loglevel="warning").execute_from_commandline()


if __name__ == "__main__":
    main()
