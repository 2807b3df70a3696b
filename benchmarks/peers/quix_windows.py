"""Quix Streams: eight aggregates by key in tumbling windows of one, two and three hours.

usage: python quix_windows.py BOOTSTRAP TOPIC SCHEMA_FILE SCHEMA_ID RECORDS WARM STATE_FOLDER RESULT

Prints one JSON object and writes the windows that the last record is in. State is RocksDB with a
changelog topic, as Quix Streams comes; positions are committed every 5 s, as it comes. One reducer
keeps all eight: that is one state a window, not eight.
"""

from __future__ import annotations

import json
import sys
import time
from datetime import timedelta
from typing import Any

import windowed
from quixstreams import Application
from quixstreams.models import Deserializer


class ReadingDeserializer(Deserializer):
    """Framed Avro; None for records of another schema."""

    def __init__(self, schema_file: str, schema_id: str) -> None:
        super().__init__()
        self._read = windowed.reader(schema_file, schema_id)

    def __call__(self, value: bytes, ctx: Any) -> Any:
        """The fields of one reading."""
        return self._read(value)


def _event_time_ms(value: Any, headers: Any, timestamp: float, kind: Any) -> int:
    return timestamp if value is None else int(value["occurred_at"].timestamp() * 1000)


def main() -> None:
    """Read until all records were counted."""
    bootstrap, topic_name, schema_file, schema_id, records, warm, folder, result = sys.argv[1:]
    expected, start_at = int(records), int(warm)
    app = Application(
        broker_address=bootstrap,
        consumer_group=f"quix-{time.time_ns()}",
        auto_offset_reset="earliest",
        state_dir=folder,
        loglevel="WARNING",
        producer_extra_config={"compression.type": "lz4"},
    )
    topic = app.topic(
        topic_name,
        key_deserializer="str",
        value_deserializer=ReadingDeserializer(schema_file, schema_id),
        timestamp_extractor=_event_time_ms,
    )
    seen = 0
    began = ended = (0.0, 0.0)
    found: dict[int, dict[tuple[str, int], Any]] = {hours: {} for hours in windowed.HOURS}
    frame = app.dataframe(topic).filter(lambda value: value is not None)

    def tally(hours: int) -> Any:
        """Keeps the newest state of each window; the last of the three counts the records."""
        states = found[hours]

        def keep(window: Any, key: Any, timestamp: int, headers: Any) -> None:
            nonlocal seen, began, ended
            states[(key, window["start"])] = window["value"]
            if hours != windowed.HOURS[-1]:
                return
            seen += 1
            if seen == start_at:
                began = (time.perf_counter(), time.process_time())
            if seen == expected:
                ended = (time.perf_counter(), time.process_time())
                app.stop()

        return keep

    for hours in windowed.HOURS:
        windows = frame.tumbling_window(timedelta(hours=hours), name=f"{hours}h").reduce(
            reducer=lambda state, value: windowed.added(state, value["value"]),
            initializer=lambda value: windowed.added(windowed.nothing(), value["value"]),
        )
        windows.current().update(tally(hours), metadata=True)
    app.run()
    newest = {hours: max(start for _, start in states) for hours, states in found.items()}
    windowed.write_results(
        result,
        {
            hours: [(key, one) for (key, start), one in states.items() if start == newest[hours]]
            for hours, states in found.items()
        },
    )
    figures = {
        "records": expected - start_at,
        "seconds": ended[0] - began[0],
        "cpu_seconds": ended[1] - began[1],
        "peak_rss_mb": windowed.peak_rss_mb(),
    }
    print(json.dumps({"figures": figures}), flush=True)


if __name__ == "__main__":
    main()
