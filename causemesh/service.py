"""What a service process stands on: connections made once, runners, the admin API, a clean end."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

import structlog
import uvicorn
import uvloop
from fastapi import APIRouter
from opentelemetry.sdk.trace import TracerProvider
from sqlalchemy.ext.asyncio import AsyncEngine

from causemesh.admin import create_app
from causemesh.bus.base import BEFORE_FIRST, Bus, Producer
from causemesh.bus.opening import open_bus
from causemesh.catalogue import DEADLETTERS, Catalogue
from causemesh.checkpoints import CheckpointSettings
from causemesh.clock import SystemClock
from causemesh.codec.base import BatchDecoder
from causemesh.codec.decode import Decoder
from causemesh.codec.encode import RegistryEncoders
from causemesh.codec.registry import HttpRegistry
from causemesh.collector import collect_seldom
from causemesh.errors import Fatal, MeshError, Misdeclared, Retryable
from causemesh.faultpoints import arm
from causemesh.migrations import migrate
from causemesh.outbox import OutboxDrain
from causemesh.outbox_backlog import backlog
from causemesh.periodic import patiently, repeat
from causemesh.positions import PositionStore
from causemesh.positions_sql import SqlPositionStore
from causemesh.runner import Emitter, Limits, PartitionWorker, Processor, Runner, Stage
from causemesh.settings import API_PORTS, ServiceSettings
from causemesh.spans import UnitSpans, tracer_provider
from causemesh.spans_sending import OutboxSpans
from causemesh.sql import open_engine
from causemesh.telemetry import Metrics, configure_logging

_log = structlog.get_logger(__name__)
_WATCH_S = 5.0


class Service:
    """One service's connections and the runners made on them.

    Made by `open_service`; a composition root calls `runner`, `outbox` and at last `serve`.
    """

    def __init__(
        self,
        name: str,
        settings: ServiceSettings,
        *,
        catalogue: Catalogue,
        bus: Bus,
        registry: HttpRegistry,
        engine: AsyncEngine,
    ) -> None:
        self.name = name
        self.settings = settings
        self.catalogue = catalogue
        self.bus = bus
        self.registry = registry
        self.engine = engine
        self.clock = SystemClock()
        self.store = SqlPositionStore(engine)
        self.encoders = RegistryEncoders(registry)
        self.decoder: BatchDecoder = Decoder(registry)
        self.metrics = Metrics()
        self._tracing: TracerProvider | None = None
        if settings.otlp_endpoint:
            self._tracing = tracer_provider(name, settings.otlp_endpoint, settings.trace_ratio)
        self.tracer = self._tracing.get_tracer("causemesh") if self._tracing else None
        self.runners: list[Runner] = []
        self._stages: list[Stage] = []
        self._topics: set[str] = set()
        self._producers: list[Producer] = []
        self._outbox = False
        self.probes: list[Callable[[], Mapping[str, str]]] = []
        """What else must be ready, beside the runners; see `create_app`."""

    def emitter(self, writes: Sequence[str]) -> Emitter:
        """Sends to declared topics. Raises Misdeclared when this service may not write one."""
        self.catalogue.require(self.name, writes=writes)
        self._topics |= set(writes)
        return Emitter(self.catalogue, self.encoders, self.producer(), writes)

    def producer(self) -> Producer:
        """A producer that is closed with the service."""
        producer = self.bus.producer(f"causemesh-{self.name}")
        self._producers.append(producer)
        return producer

    def runner(
        self,
        stage: Stage,
        make_processor: Callable[[int], Processor],
        limits: Limits | None = None,
        *,
        store: PositionStore | None = None,
        checkpoints: CheckpointSettings | None = None,
    ) -> Runner:
        """A runner for `stage`; `make_processor(partition)` builds each worker's processor.

        Positions lie in the service's database unless another `store` holds them with its effects.
        With `checkpoints` a large state goes to files.

        Raises Misdeclared when the catalogue does not let this service read or write a topic.
        """
        reads = [*stage.shared, *stage.broadcast]
        self.catalogue.require(self.name, reads=reads)
        self._topics |= set(reads)
        emitter = self.emitter([*stage.writes, DEADLETTERS])

        def make_worker(partition: int) -> PartitionWorker:
            processor = make_processor(partition)
            spans = UnitSpans(self.tracer, self.settings.bus, stage.group, hold=processor.stateful)
            return PartitionWorker(
                stage,
                partition,
                processor,
                bus=self.bus,
                store=store or self.store,
                catalogue=self.catalogue,
                decoder=self.decoder,
                emitter=emitter,
                clock=self.clock,
                limits=limits or Limits(),
                observer=self.metrics,
                spans=spans,
                checkpoints=checkpoints,
            )

        membership = self.bus.membership(stage.group, stage.shared)
        runner = Runner(membership, make_worker, self.clock)
        self.runners.append(runner)
        self._stages.append(stage)
        return runner

    def outbox(self, writes: Sequence[str]) -> OutboxDrain:
        """The drain of this service's outbox to `writes`; run it as a task of `serve`."""
        self._outbox = True
        spans = OutboxSpans(self.tracer, self.settings.bus)
        return OutboxDrain(
            self.name, self.engine, self.catalogue, self.emitter(writes), spans=spans
        )

    async def serve(
        self,
        routers: Sequence[APIRouter] = (),
        tasks: Sequence[Callable[[], Coroutine[Any, Any, None]]] = (),
    ) -> None:
        """Run all runners, tasks and the API until SIGTERM or SIGINT, or until one fails.

        On a signal units in progress are finished. Raises what failed.
        """
        await self._ensure_topics()
        server = self._server(routers)
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        running = [asyncio.create_task(runner.run()) for runner in self.runners]
        background = [asyncio.create_task(task()) for task in [*tasks, *self._watches()]]
        web = asyncio.create_task(server.serve())
        stopping = asyncio.create_task(stop.wait())
        _log.info("service_started", port=server.config.port)
        waiting = {*running, *background, web, stopping}
        ended, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        early = [task for task in ended if task is not stopping]
        stopping.cancel()
        for task in background:
            task.cancel()
        for runner in self.runners:
            runner.stop()
        server.should_exit = True
        results = await asyncio.gather(*running, *background, web, return_exceptions=True)
        failures = [error for error in results if isinstance(error, Exception)]
        _log.info("service_stopped", failures=[str(error) for error in failures])
        if failures:
            raise failures[0]
        if early:
            raise Fatal(f"{early[0].get_coro()} ended, though nobody asked it to")

    def _server(self, routers: Sequence[APIRouter]) -> uvicorn.Server:
        app = create_app(
            self.name, self.settings.token(), self.metrics.registry, self._missing, routers
        )
        config = uvicorn.Config(
            app,
            host=self.settings.api_host,
            port=self.settings.api_port or API_PORTS[self.name],
            log_config=None,
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=3,
        )
        return _Server(config)

    async def _missing(self) -> dict[str, str]:
        """What keeps the service from its work: partitions with no worker at all."""
        idle = {
            stage.group: "owns no partition yet"
            for stage, runner in zip(self._stages, self.runners, strict=True)
            if not runner.workers
        }
        for probe in self.probes:
            idle |= probe()
        return idle

    async def _ensure_topics(self) -> None:
        """Create the topics this service touches, so that services start in any order."""
        admin = self.bus.admin()
        try:
            await patiently(
                lambda: admin.ensure([self.catalogue.topic(name) for name in sorted(self._topics)])
            )
        finally:
            await admin.close()

    def _watches(self) -> list[Callable[[], Coroutine[Any, Any, None]]]:
        return [self._watch_lag, self._watch_outbox] if self._outbox else [self._watch_lag]

    async def _watch_outbox(self) -> None:
        await repeat("outbox_backlog", self._note_backlog, self.clock, _WATCH_S)

    async def _note_backlog(self) -> None:
        waiting = await backlog(self.engine)
        self.metrics.outbox(waiting.rows, waiting.oldest_s)

    async def _watch_lag(self) -> None:
        admin = self.bus.admin()
        try:
            while True:
                await asyncio.sleep(_WATCH_S)
                with suppress(Retryable):  # the runners report a broker that is away
                    await self._note_lag(admin)
        finally:
            await admin.close()

    async def _note_lag(self, admin: Any) -> None:
        topics = {name for stage in self._stages for name in (*stage.shared, *stage.broadcast)}
        if not topics:
            return
        ends = await admin.ends(sorted(topics))
        for stage, runner in zip(self._stages, self.runners, strict=True):
            for worker in list(runner.workers.values()):
                for source, at in worker.positions.items():
                    behind = ends.get(source, BEFORE_FIRST) - at
                    self.metrics.lag(stage.group, source, max(behind, 0))

    async def close(self) -> None:
        """Close every connection."""
        for producer in self._producers:
            await producer.close()
        if self._tracing is not None:  # sends the spans that wait
            await asyncio.to_thread(self._tracing.shutdown)
        await self.registry.close()
        await self.bus.close()
        await self.engine.dispose()


class _Server(uvicorn.Server):
    """A web server that leaves signals and the end of the process to `Service.serve`."""

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await super().serve(sockets)
        except SystemExit:
            host, port = self.config.host, self.config.port
            raise Misdeclared(
                f"the admin API can't listen on {host}:{port}; set CAUSEMESH_API_PORT to a free"
                " port"
            ) from None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def open_service(
    name: str, settings: ServiceSettings, *, migrated: bool = True
) -> AsyncIterator[Service]:
    """Connect a service and bring its database up to date; closes all at the end.

    `migrated` false leaves the database alone: the lake's tables are made by its library.
    """
    configure_logging(name, level=settings.log_level, form=settings.log_format)
    settings.token()
    arm(settings.fault)
    projects = [settings.project] if settings.project else []
    catalogue = Catalogue.load(projects, partitions=settings.partitions)
    async with AsyncExitStack() as stack:
        engine = open_engine(
            f"{settings.postgres_url}/{name}",
            name,
            settings.session_timeout_ms,
            pool_size=10,
            max_overflow=10,
        )
        stack.push_async_callback(engine.dispose)
        if migrated:
            await patiently(lambda: migrate(name, engine))
        bus = open_bus(settings)
        registry = HttpRegistry(settings.registry_url)
        service = Service(
            name, settings, catalogue=catalogue, bus=bus, registry=registry, engine=engine
        )
        stack.push_async_callback(service.close)
        yield service


def run_process(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a service's `main` as a process: exit status 0 after a signal, 1 after a failure."""
    collect_seldom()
    try:
        uvloop.run(main())
    except MeshError as error:
        _log.error("service_failed", reason=str(error))
        sys.exit(1)
