"""Logs are one JSON object a line, libraries' included; metrics keep their names."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import structlog
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import get_current_span
from prometheus_client import generate_latest
from prometheus_client.exposition import choose_encoder

from causemesh.runner import NEVER, Stage, UnitReport
from causemesh.spans_sending import DoorSpans
from causemesh.telemetry import Metrics, configure_logging

STAGE = Stage("door", "door", ("inbox.t",))


@pytest.fixture
def logging_restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.usefixtures("logging_restored")
def test_every_line_is_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("ingest")
    log = structlog.get_logger("here")
    log.info("two\nlines", count=3, odd={1, 2}, raw=b"\xff")
    log.debug("below the level")
    try:
        raise ValueError("a\nb")
    except ValueError as error:
        log.error("failed", exc_info=error)
    logging.getLogger("aiokafka").warning("broker %s\nis away", 5)
    logging.getLogger("aiokafka").info("chatter")
    first, failed, foreign = lines(capsys)
    assert (first["event"], first["service"], first["level"]) == ("two\nlines", "ingest", "info")
    assert first["count"] == 3
    assert first["timestamp"].endswith("Z")
    assert "ValueError: a\nb" in failed["exception"]
    assert (foreign["event"], foreign["logger"]) == ("broker 5\nis away", "aiokafka")
    assert (foreign["level"], foreign["service"]) == ("warning", "ingest")


@pytest.mark.usefixtures("logging_restored")
def test_the_level_is_that_of_the_settings(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("ingest", level="error")
    structlog.get_logger().warning("quiet")
    structlog.get_logger().error("loud")
    assert [line["event"] for line in lines(capsys)] == ["loud"]


@pytest.mark.usefixtures("logging_restored")
def test_a_console_gets_readable_lines(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("ingest", form="console")
    structlog.get_logger().info("started", port=81)
    out = capsys.readouterr().out
    assert "started" in out
    assert "port=81" in out
    assert not out.startswith("{")


def exposed(metrics: Metrics) -> dict[str, float]:
    text = generate_latest(metrics.registry).decode()
    pairs = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


def test_units_of_work_are_counted() -> None:
    metrics = Metrics()
    metrics.unit_done(STAGE, 2, UnitReport(10, 1, 2, 7, 0.02, 5_000_000))
    metrics.unit_done(STAGE, 2, UnitReport(5, 0, 0, 5, 0.3, 6_000_000))
    by_topic = ({"inbox.t": 4, "inbox.u": 1}, {"events.t": 4})
    metrics.unit_done(STAGE, 0, UnitReport(5, 0, 0, 4, 0.3, 6_000_000, *by_topic))
    metrics.unit_done(STAGE, 1, UnitReport(5, 0, 0, 4, 0.3, 6_000_000, *by_topic))
    metrics.lag("door", ("inbox.t", 2), 41)
    metrics.outcomes.labels("reject", "late").inc(3)
    found = exposed(metrics)
    at = '{group="door",partition="2"}'
    assert found[f"causemesh_records_total{at}"] == 15
    assert found[f"causemesh_replays_total{at}"] == 1
    assert found[f"causemesh_dead_letters_total{at}"] == 2
    assert found[f"causemesh_sent_total{at}"] == 12
    assert found[f"causemesh_watermark_seconds{at}"] == 6
    assert found['causemesh_topic_records_total{group="door",topic="inbox.t"}'] == 8
    assert found['causemesh_topic_records_total{group="door",topic="inbox.u"}'] == 2
    assert found['causemesh_topic_sent_total{group="door",topic="events.t"}'] == 8
    assert found['causemesh_batch_records_count{group="door"}'] == 4
    assert found['causemesh_unit_seconds_bucket{group="door",le="0.025"}'] == 1
    assert found['causemesh_lag_records{group="door",partition="2",topic="inbox.t"}'] == 41
    assert found['causemesh_outcomes_total{kind="reject",outcome="late"}'] == 3


def test_latencies_name_a_trace_where_openmetrics_is_asked_for() -> None:
    metrics = Metrics()
    ids = {"trace_id": "4b" * 16, "span_id": "0f" * 8}
    metrics.unit_done(STAGE, 0, UnitReport(1, 0, 0, 0, 0.02, NEVER, exemplar=ids))
    metrics.unit_done(STAGE, 0, UnitReport(1, 0, 0, 0, 0.3, NEVER))
    encode, kind = choose_encoder("application/openmetrics-text;version=1.0.0,text/plain;q=0.5")
    assert kind.startswith("application/openmetrics-text")
    lines = encode(metrics.registry).decode().splitlines()
    (told,) = [line for line in lines if "# {" in line]
    assert told.startswith('causemesh_unit_seconds_bucket{group="door",le="0.025"} 1.0 # {')
    assert all(f'{name}="{value}"' in told for name, value in ids.items())
    assert "trace_id" not in generate_latest(metrics.registry).decode()


@pytest.mark.usefixtures("logging_restored")
def test_lines_of_a_traced_call_have_its_ids(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("ingest")
    log = structlog.get_logger()
    door = DoorSpans(TracerProvider(shutdown_on_exit=False).get_tracer("test"), "kafka")
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    with door.serving("POST", "/x", f"00-{trace}-00f067aa0ba902b7-01"):
        span = get_current_span()
        log.info("here")
        logging.getLogger("aiokafka").warning("there")
    log.info("elsewhere")
    here, there, elsewhere = lines(capsys)
    ids = {"trace_id": trace, "span_id": f"{span.get_span_context().span_id:016x}"}
    assert ids.items() <= here.items()
    assert ids.items() <= there.items()
    assert "trace_id" not in elsewhere


def test_a_watermark_that_never_was_is_not_shown() -> None:
    metrics = Metrics()
    metrics.unit_done(STAGE, 0, UnitReport(1, 0, 0, 0, 0.1, NEVER))
    assert not [name for name in exposed(metrics) if name.startswith("causemesh_watermark")]


def test_two_services_in_one_process_do_not_share_metrics() -> None:
    one, other = Metrics(), Metrics()
    one.outcomes.labels("reject", "late").inc()
    assert 'causemesh_outcomes_total{kind="reject",outcome="late"}' not in exposed(other)
