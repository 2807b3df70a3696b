"""Quix Streams: count and sum by key in a tumbling window of one hour.

usage: python quix_features.py BOOTSTRAP TOPIC SCHEMA_FILE SCHEMA_ID RECORDS WARM STATE_FOLDER

Prints one JSON object. State is RocksDB with a changelog topic, as Quix Streams comes; positions
are committed every 5 s, as it comes.
"""

from __future__ import annotations

import io
import json
import re
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import fastavro
from quixstreams import Application
from quixstreams.dataframe.windows import Count, Sum
from quixstreams.models import Deserializer


class ReadingDeserializer(Deserializer):
    """Framed Avro; None for records of another schema."""

    def __init__(self, schema: Any, schema_id: int) -> None:
        super().__init__()
        self._schema = fastavro.parse_schema(schema)
        self._header = b"\0" + schema_id.to_bytes(4, "big")

    def __call__(self, value: bytes, ctx: Any) -> Any:
        """The fields of one reading."""
        if value[:5] != self._header:
            return None
        return fastavro.schemaless_reader(io.BytesIO(value[5:]), self._schema)


def _event_time_ms(value: Any, headers: Any, timestamp: float, kind: Any) -> int:
    return timestamp if value is None else int(value["occurred_at"].timestamp() * 1000)


def peak_rss_mb() -> float:
    """Most memory of this process so far; getrusage would count what its parent had at the fork."""
    told = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(told[1]) / 1000 if told else 0.0


def main() -> None:
    """Read until all records were counted."""
    bootstrap, topic_name, schema_file, schema_id, records, warm, folder = sys.argv[1:]
    expected, start_at = int(records), int(warm)
    app = Application(
        broker_address=bootstrap,
        consumer_group=f"quix-{time.time_ns()}",
        auto_offset_reset="earliest",
        state_dir=folder,
        loglevel="WARNING",
        producer_extra_config={"compression.type": "lz4"},
    )
    with open(schema_file) as file:
        schema = json.load(file)
    topic = app.topic(
        topic_name,
        key_deserializer="str",
        value_deserializer=ReadingDeserializer(schema, int(schema_id)),
        timestamp_extractor=_event_time_ms,
    )
    seen = 0
    began = ended = (0.0, 0.0)
    totals: dict[tuple[str, int], tuple[int, float]] = {}

    def tally(window: Any, key: Any, timestamp: int, headers: Any) -> None:
        nonlocal seen, began, ended
        totals[(key, window["start"])] = (window["count"], window["sum"])
        seen += 1
        if seen == start_at:
            began = (time.perf_counter(), time.process_time())
        if seen == expected:
            ended = (time.perf_counter(), time.process_time())
            app.stop()

    frame = app.dataframe(topic).filter(lambda value: value is not None)
    windows = frame.tumbling_window(timedelta(hours=1)).agg(count=Count(), sum=Sum("value"))
    windows.current().update(tally, metadata=True)
    app.run()
    figures = {
        "records": expected - start_at,
        "seconds": ended[0] - began[0],
        "cpu_seconds": ended[1] - began[1],
        "count": sum(count for count, _ in totals.values()),
        "sum": sum(total for _, total in totals.values()),
        "peak_rss_mb": peak_rss_mb(),
    }
    print(json.dumps({"figures": figures}), flush=True)


if __name__ == "__main__":
    main()
