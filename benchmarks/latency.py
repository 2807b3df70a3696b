"""What a prediction takes over the topics at a fixed rate, hop by hop, beside a bare broker echo.

usage: python -m benchmarks.latency [--rates 20 50 200] [--seconds 20] [--warm 40]

Starts the flights mesh with all six services in .causemesh-latency. Requests are sent at their
scheduled times whether or not earlier ones were answered, and each latency counts from the
scheduled time, so a stall is not hidden by what it holds up. The echo writes and reads single
records of the same size on the same broker, at the same rate.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from benchmarks.produce import topic_named
from causemesh.bus.base import Outbound, RawBatch, TopicPartition
from causemesh.bus.opening import open_bus
from causemesh.catalogue import Catalogue
from causemesh.cli import running
from causemesh.client import REQUESTS, Client
from causemesh.codec.decode import Decoder
from causemesh.codec.registry import HttpRegistry
from causemesh.local.mesh import Mesh
from causemesh.settings import ServiceSettings
from examples.flights import model, training
from examples.flights.dataset import MODEL
from examples.flights.demo import PROJECT

HOPS = (
    REQUESTS,
    "inference.requests.v1",
    "inference.tasks.realtime.v1",
    "inference.predictions.v1",
)
_HOME = Path(".causemesh-latency")
_WARM_S = 2
_PARTITIONS = 2
_LOST_S = 30
_INPUT = "input."


@dataclass
class Seen:
    """Microseconds by request id: when it was due, when each hop wrote it, when it was read."""

    due: dict[str, float] = field(default_factory=dict)
    written: dict[str, dict[str, int]] = field(default_factory=lambda: {name: {} for name in HOPS})
    read: dict[str, float] = field(default_factory=dict)


class Probe:
    """Sends requests and follows them over the topics."""

    def __init__(self, mesh: Mesh) -> None:
        told = mesh.environment()
        settings = ServiceSettings(
            kafka_bootstrap=told["CAUSEMESH_KAFKA_BOOTSTRAP"],
            registry_url=told["CAUSEMESH_REGISTRY_URL"],
        )
        self.catalogue = Catalogue.load([PROJECT], partitions=_PARTITIONS)
        self.bus = open_bus(settings)
        self.registry = HttpRegistry(settings.registry_url)
        self.decoder = Decoder(self.registry)
        self.producer = self.bus.producer("benchmark")
        self.client = Client(self.catalogue, self.registry, self.producer)

    async def close(self) -> None:
        """Close the connections."""
        await self.producer.close()
        await self.registry.close()
        await self.bus.close()

    async def predictions(self, rate: float, seconds: float) -> Seen:
        """Ask for predictions at `rate` a second."""
        seen, run = Seen(), uuid.uuid4().hex[:8]
        named = [name for name in model.FEATURES if name.startswith(_INPUT)]
        inputs = [{"name": name.removeprefix(_INPUT), "value": 12.0} for name in named]
        admin = self.bus.admin()
        begun = await admin.ends(HOPS)
        await admin.close()
        reader = self.bus.reader({key: at for key, at in begun.items() if key[0] == HOPS[-1]})
        await reader.fetch(1, 0.5)

        async def one(number: int, due: float) -> None:
            request_id = f"{run}-{number}"
            seen.due[request_id] = due * 1e6
            row = {
                "event_id": request_id,
                "tenant_id": "AA",
                "occurred_at": datetime.now(UTC),
                "model": MODEL,
                "version": 1,
                "entities": [{"name": "tail_number", "value": f"N{number % 500}"}],
                "inputs": inputs,
            }
            await self.client.request([row])

        async def follow() -> None:
            while len(seen.read) < rate * seconds:
                for raw in await reader.fetch(5_000, 0.1):
                    await self._note(raw, seen)

        try:
            await _open_loop(one, follow, rate, seconds)
        finally:
            await reader.close()
        await self._read_hops(begun, seen)
        return seen

    async def _read_hops(self, begun: Mapping[TopicPartition, int], seen: Seen) -> None:
        """When each hop wrote the requests, from the log: afterwards, as it costs time too."""
        reader = self.bus.reader({key: at for key, at in begun.items() if key[0] != HOPS[-1]})
        try:
            while any(seen.due.keys() - seen.written[name].keys() for name in HOPS[:-1]):
                for raw in await reader.fetch(5_000, 1.0):
                    await self._note(raw, seen)
        finally:
            await reader.close()

    async def _note(self, raw: RawBatch, seen: Seen) -> None:
        now = time.time() * 1e6
        decoded = await self.decoder.decode(raw.values, self.catalogue.topic(raw.topic).record)
        name = "request_id" if "request_id" in decoded.frame.columns else "event_id"
        ids = decoded.frame[name].to_list()
        written = seen.written[raw.topic]
        written.update(zip(ids, raw.appended_at_us[decoded.rows].tolist(), strict=True))
        if raw.topic == HOPS[-1]:
            seen.read.update(dict.fromkeys(set(ids) & seen.due.keys(), now))

    async def echo(self, rate: float, seconds: float, size: int = 200) -> Seen:
        """Write and read bare records at `rate` a second."""
        seen, topic = Seen(), topic_named(f"benchmark.{uuid.uuid4().hex}")
        admin = self.bus.admin()
        await admin.ensure([topic])
        await admin.close()
        sources = {(topic.name, number): -1 for number in range(topic.partitions)}
        reader = self.bus.reader(sources)
        await reader.fetch(1, 0.5)

        async def one(number: int, due: float) -> None:
            seen.due[str(number)] = due * 1e6
            value = str(number).encode().ljust(size)
            part = Outbound(topic.name, number % topic.partitions, [None], [value])
            await self.producer.send([part])

        async def follow() -> None:
            while len(seen.read) < rate * seconds:
                for raw in await reader.fetch(5_000, 0.1):
                    now = time.time() * 1e6
                    seen.read.update({(value or b"").decode().strip(): now for value in raw.values})

        try:
            await _open_loop(one, follow, rate, seconds)
        finally:
            await reader.close()
        return seen


async def _open_loop(
    one: Callable[[int, float], Awaitable[None]],
    follow: Callable[[], Awaitable[None]],
    rate: float,
    seconds: float,
) -> None:
    """Start `one` at each scheduled time; raises TimeoutError when some never arrive."""
    following = asyncio.ensure_future(follow())
    began = time.time()
    sent = []
    for number in range(round(rate * seconds)):
        due = began + number / rate
        if (wait := due - time.time()) > 0:
            await asyncio.sleep(wait)
        sent.append(asyncio.ensure_future(one(number, due)))
    await asyncio.gather(*sent)
    await asyncio.wait_for(following, _LOST_S)


def _line(name: str, taken_us: list[float]) -> str:
    p50, p99 = np.percentile(np.array(taken_us) / 1000, [50, 99])
    return f"  {name:44}{p50:>8.1f}{p99:>8.1f}"


def report(rate: float, echo: Seen, seen: Seen) -> None:
    """Print percentiles in milliseconds, the first seconds left out."""
    ids = list(seen.due)[round(rate * _WARM_S) :]
    echoed = list(echo.due)[round(rate * _WARM_S) :]
    print(f"{rate:g} requests/s{'':33}p50 ms  p99 ms")
    print(_line("bare echo", [echo.read[one] - echo.due[one] for one in echoed]))
    print(_line("request to prediction", [seen.read[one] - seen.due[one] for one in ids]))
    for before, after in itertools.pairwise(HOPS):
        taken = [float(seen.written[after][one] - seen.written[before][one]) for one in ids]
        print(_line(f"  to {after}", taken))


async def measure(mesh: Mesh, rates: list[float], seconds: float, warm_s: float) -> None:
    """Measure and print each rate."""
    probe = Probe(mesh)
    try:
        await probe.predictions(50, warm_s)
        for rate in rates:
            report(rate, await probe.echo(rate, seconds), await probe.predictions(rate, seconds))
    finally:
        await probe.close()


def main() -> None:
    """Start the mesh, measure, stop."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rates", type=float, nargs="+", default=[20, 50, 200])
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--warm", type=float, default=40, help="seconds at 50/s before measuring")
    told = parser.parse_args()
    mesh = running.up(_HOME, PROJECT, lambda name, state: None, partitions=_PARTITIONS)
    try:
        training.register(mesh, 1, model.baseline_onnx())
        asyncio.run(measure(mesh, told.rates, told.seconds, told.warm))
    finally:
        running.down(_HOME)


if __name__ == "__main__":
    main()
