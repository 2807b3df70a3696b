"""Logs as JSON lines and metrics for Prometheus."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, MutableMapping
from typing import Any, TypeVar, cast

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics import MetricWrapperBase

from causemesh.bus.base import TopicPartition
from causemesh.log_limit import RepeatLimit
from causemesh.runner.batch import NEVER
from causemesh.runner.observer import UnitReport
from causemesh.runner.stage import Stage
from causemesh.spans import trace_ids

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_RECORDS = (1, 3, 10, 30, 100, 300, 1_000, 3_000, 10_000, 30_000)
_GROUP = ("group", "partition")
_Metric = TypeVar("_Metric", bound=MetricWrapperBase)


def configure_logging(service: str, *, level: str = "info", form: str = "json") -> None:
    """One JSON object a line on standard output (or readable lines with `form` "console").

    Log lines of libraries go the same way, from warnings on, repeats counted. A line of a traced
    unit or call has its trace_id and span_id.
    """
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        _with_trace,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    last: Any = structlog.processors.JSONRenderer()
    if form == "console":
        last = structlog.dev.ConsoleRenderer(colors=sys.stdout.isatty())
    structlog.configure(
        processors=[*shared, last],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelName(level.upper())),
        logger_factory=structlog.PrintLoggerFactory(),
    )
    structlog.contextvars.bind_contextvars(service=service)
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.add_logger_name],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, last],
        )
    )
    logging.basicConfig(level=logging.WARNING, handlers=[RepeatLimit(handler)], force=True)


def _with_trace(logger: Any, method: str, line: MutableMapping[str, Any]) -> Mapping[str, Any]:
    ids = trace_ids()
    if ids is not None:
        line.update(ids)
    return line


class Metrics:
    """A service's metrics, in a registry of their own; see `Observer`."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._children: dict[tuple[MetricWrapperBase, tuple[str, ...]], MetricWrapperBase] = {}
        self._records = self._counter("records", "Records read.")
        self._replays = self._counter("replays", "Records dropped as replays.")
        self._dead = self._counter("dead_letters", "Records sent to the dead letters.")
        self._sent = self._counter("sent", "Records sent.")
        self._topic_records = self._topic_counter("topic_records", "Records read, by topic.")
        self._topic_sent = self._topic_counter("topic_sent", "Records sent, by topic.")
        self._batch = Histogram(
            "causemesh_batch_records",
            "Records a unit of work.",
            ("group",),
            buckets=_RECORDS,
            registry=self.registry,
        )
        self._latency = Histogram(
            "causemesh_unit_seconds",
            "Seconds from fetched to committed.",
            ("group",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._calls = Histogram(
            "causemesh_request_seconds",
            "Seconds of a call at the door, from its body read to its answer known.",
            ("route", "status"),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._watermark = Gauge(
            "causemesh_watermark_seconds",
            "Event time reached, Unix seconds.",
            _GROUP,
            registry=self.registry,
        )
        self._lag = Gauge(
            "causemesh_lag_records",
            "Records in the log behind the worker's position.",
            ("group", "topic", "partition"),
            registry=self.registry,
        )
        self._outbox_rows = self._gauge("outbox_rows", "Rows of the outbox that were not sent yet.")
        self._outbox_oldest = self._gauge(
            "outbox_oldest_seconds", "Age of the oldest row of the outbox that was not sent yet."
        )
        self.outcomes = Counter(
            "causemesh_outcomes",
            "Decisions by kind: outcomes, rejects by reason, reviews, alerts.",
            ("kind", "outcome"),
            registry=self.registry,
        )

    def _counter(self, name: str, about: str) -> Counter:
        return Counter(f"causemesh_{name}", about, _GROUP, registry=self.registry)

    def _topic_counter(self, name: str, about: str) -> Counter:
        return Counter(f"causemesh_{name}", about, ("group", "topic"), registry=self.registry)

    def _gauge(self, name: str, about: str) -> Gauge:
        return Gauge(f"causemesh_{name}", about, registry=self.registry)

    def unit_done(self, stage: Stage, partition: int, report: UnitReport) -> None:
        """See `Observer.unit_done`."""
        at = (stage.group, str(partition))
        self._of(self._records, at).inc(report.records)
        self._of(self._sent, at).inc(report.sent)
        self._of(self._replays, at).inc(report.replays)
        self._of(self._dead, at).inc(report.dead)
        for topic, count in report.records_of.items():
            self._of(self._topic_records, (stage.group, topic)).inc(count)
        for topic, count in report.sent_to.items():
            self._of(self._topic_sent, (stage.group, topic)).inc(count)
        group = (stage.group,)
        self._of(self._batch, group).observe(report.records)
        exemplar = None if report.exemplar is None else dict(report.exemplar)
        self._of(self._latency, group).observe(report.seconds, exemplar)
        if report.watermark_us != NEVER:
            self._of(self._watermark, at).set(report.watermark_us / 1e6)

    def _of(self, metric: _Metric, labels: tuple[str, ...]) -> _Metric:
        """`metric.labels(...)`, looked up once: it checks names and takes a lock each time."""
        child = self._children.get((metric, labels))
        if child is None:
            child = self._children[(metric, labels)] = metric.labels(*labels)
        return cast(_Metric, child)

    def call_done(
        self, route: str, status: int, seconds: float, exemplar: Mapping[str, str] | None
    ) -> None:
        """See `DoorSpans`."""
        named = None if exemplar is None else dict(exemplar)
        self._calls.labels(route, str(status)).observe(seconds, named)

    def lag(self, group: str, source: TopicPartition, records: int) -> None:
        """Note how far behind its log a worker is."""
        self._lag.labels(group, source[0], str(source[1])).set(records)

    def outbox(self, rows: int, oldest_s: float) -> None:
        """Note what waits in the outbox."""
        self._outbox_rows.set(rows)
        self._outbox_oldest.set(oldest_s)
