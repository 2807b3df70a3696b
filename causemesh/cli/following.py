"""Commands over topics: what is in them, how far readers are, and writing to them."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from causemesh.cli.context import Connections, apis_at, connections, settings_at
from causemesh.cli.output import readable
from causemesh.client import connect
from causemesh.errors import Misdeclared
from causemesh.log import Span

_CHUNK = 1_000
_CONTROLS = 5_000  # watermarks between the last records, generously


async def topics(home: Path) -> list[Mapping[str, Any]]:
    """A row a topic: its owner, form, partitions and how many records were ever written."""
    async with connections(home) as mesh:
        admin = mesh.bus.admin()
        try:
            ends = await admin.ends(sorted(mesh.catalogue.topics))
        finally:
            await admin.close()
    written: dict[str, int] = {}
    for (name, _), last in ends.items():
        written[name] = written.get(name, 0) + last + 1
    return [
        {
            "topic": topic.name,
            "owner": topic.owner,
            "form": topic.form,
            "partitions": topic.partitions,
            "written": written.get(topic.name, 0),
        }
        for topic in mesh.catalogue.topics.values()
    ]


async def lag(home: Path) -> list[Mapping[str, Any]]:
    """A row a service and input topic, from each service's own metrics."""
    apis = apis_at(home)
    behind: dict[tuple[str, str], int] = {}
    for service in apis.services:
        with apis.client(service) as api:
            text = api.get("/metrics").text
        for line in text.splitlines():
            if line.startswith("causemesh_lag_records{"):
                labels, value = line.removeprefix("causemesh_lag_records{").rsplit("} ", 1)
                named = dict(part.split("=", 1) for part in labels.split(","))
                key = (named["group"].strip('"'), named["topic"].strip('"'))
                behind[key] = behind.get(key, 0) + int(float(value))
    return [
        {"group": group, "topic": topic, "records": count}
        for (group, topic), count in sorted(behind.items())
    ]


async def tail(home: Path, topic: str, count: int, *, follow: bool) -> None:
    """Print the last records of a topic, and those to come with `follow`."""
    async with connections(home) as mesh:
        mesh.catalogue.topic(topic)
        spans = await mesh.log.ends([topic])
        back = count + _CONTROLS
        recent = {at: Span(max(span.last - back, -1), span.last) for at, span in spans.items()}
        rows = await _rows(mesh, recent)
        for row in sorted(rows, key=lambda row: str(row["occurred_at"]))[-count:]:
            print(json.dumps(row, default=readable))
        after = {at: span.last for at, span in spans.items()}
        while follow:
            ends = await mesh.log.ends([topic])
            for row in await _rows(
                mesh, {at: Span(after[at], end.last) for at, end in ends.items()}
            ):
                print(json.dumps(row, default=readable), flush=True)
            after = {at: end.last for at, end in ends.items()}


async def _rows(mesh: Connections, spans: Mapping[tuple[str, int], Span]) -> list[dict[str, Any]]:
    rows = []
    async for batch in mesh.log.read(spans):
        for position, row in zip(batch.positions.tolist(), batch.frame.to_dicts(), strict=True):
            rows.append({"partition": batch.partition, "position": position, **row})
    return rows


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The JSON lines of a file, or of standard input. Raises Misdeclared naming the line."""
    try:
        text = sys.stdin.read() if str(file) == "-" else file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise Misdeclared(f"{file} can't be read: {error}") from None
    lines = enumerate(text.split("\n"), 1)
    return [_row(number, line) for number, line in lines if line.strip()]


def _row(number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise Misdeclared(f"line {number} is not JSON: {error}") from None
    if not isinstance(row, dict):
        raise Misdeclared(f"line {number} is not a JSON object")
    return row


async def produce(home: Path, event_type: str, rows: list[dict[str, Any]]) -> int:
    """Write rows to an inbox topic; returns how many. Raises Misdeclared naming what is wrong."""
    async with connect(settings=settings_at(home)) as client:
        for start in range(0, len(rows), _CHUNK):
            part = rows[start : start + _CHUNK]
            try:
                if event_type == "requests":
                    await client.request(part)
                else:
                    await client.produce(event_type, part)
            except ValueError as error:
                raise Misdeclared(f"lines {start + 1} to {start + len(part)}: {error}") from None
    return len(rows)
