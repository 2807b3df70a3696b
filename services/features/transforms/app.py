"""The composition root of the transforms: `python -m services.features.transforms.app`."""

from __future__ import annotations

import io
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import fastavro
import structlog

from causemesh.catalogue import DEADLETTERS
from causemesh.codec.wire import HEADER_BYTES, header
from causemesh.derived import Transform, require_faust
from causemesh.errors import MeshError, Misdeclared
from causemesh.runner import Limits, Stage
from causemesh.service import Service, open_service, run_process
from services.features.transforms.applying import Applier
from services.features.transforms.encoding import OutputEncoder, RecordEncoder
from services.features.transforms.feed import Feed
from services.features.transforms.loading import Function, load_function
from services.features.transforms.rows import Row
from services.features.transforms.settings import TransformSettings
from services.features.transforms.worker import TransformWorker

FEED_GROUP = "features-transform-inputs"
_log = structlog.get_logger(__name__)


async def main() -> None:
    """Wire and serve."""
    settings = TransformSettings()
    require_faust(settings.bus)
    async with open_service("features", settings) as service:
        transforms = tuple(service.catalogue.transforms.values())
        if not transforms:
            raise Misdeclared(f"{settings.project} declares no transform in its catalogue.yaml")
        functions = {one.name: load_function(one) for one in transforms}
        _feed(service, transforms)
        with tempfile.TemporaryDirectory(prefix="causemesh-transforms-") as folder:
            await _serve(service, settings, transforms, functions, Path(folder))


def _feed(service: Service, transforms: Sequence[Transform]) -> None:
    """The stage that brings the inputs together."""
    reads = sorted({topic for one in transforms for topic in one.sources})
    service.runner(
        Stage("features", FEED_GROUP, tuple(reads), tuple(one.feed for one in transforms)),
        lambda _: Feed(transforms),
        Limits(max_records=10_000, commit_every_s=0.2, bulk_gather_s=0.1),
    )


async def _serve(
    service: Service,
    settings: TransformSettings,
    transforms: Sequence[Transform],
    functions: Mapping[str, Function],
    folder: Path,
) -> None:
    """The stage of the tables, until a signal."""
    from services.features.transforms.stream import Stream  # noqa: PLC0415 - needs the extra

    catalogue, producer = service.catalogue, service.producer()
    emitter = service.emitter(
        [DEADLETTERS, *(one.output for one in transforms), *(one.state for one in transforms)]
    )
    state = catalogue.topic(transforms[0].state)  # one record for all of them
    state_id = await service.registry.register(state.subject, state.record)
    stream = Stream(
        settings.kafka_bootstrap,
        catalogue,
        folder=folder,
        session_timeout_s=settings.session_timeout_ms / 1_000,
        batch=settings.transforms_batch,
        unpack=_unpacker(state.record, state_id),
    )
    outcomes = service.metrics.outcomes
    for transform in transforms:
        output = catalogue.topic(transform.output)
        output_id = await service.registry.register(output.subject, output.record)
        subject = catalogue.topic(transform.state).subject
        await service.registry.register(subject, state.record)
        encode = OutputEncoder(output.record, output_id).encode
        function = functions[transform.name]
        table = stream.table(transform)
        worker = TransformWorker(
            transform,
            Applier(transform, function, encode, settings.transforms_timeout_s),
            table,
            catalogue=catalogue,
            decoder=service.decoder,
            producer=producer,
            emitter=emitter,
            fence=service.store,
            rows=RecordEncoder(state.record, state_id),
            clock=service.clock,
            count=lambda kind, name, number: outcomes.labels(kind, name).inc(number),
        )
        stream.add(worker, table)
    service.probes.append(stream.missing)
    await service.serve((), [stream.run])


def _unpacker(record: Mapping[str, Any], schema_id: int) -> Callable[[bytes], Row]:
    """Reads rows of the changelog. Its record is the mesh's own, so all are of one schema."""
    parsed, ours = fastavro.parse_schema(dict(record)), header(schema_id)

    def unpack(value: bytes) -> Row:
        if value[:HEADER_BYTES] != ours:
            raise Misdeclared(f"a row of the changelog is not of schema {schema_id}")
        found: Any = fastavro.schemaless_reader(io.BytesIO(value[HEADER_BYTES:]), parsed, None)
        return Row.of_record(found)

    return unpack


async def main_and_end() -> None:
    """`main`, then the end of the process: tasks and threads of Faust could hold that up."""
    status = 1
    try:
        await main()
        status = 0
    except MeshError as error:
        _log.error("service_failed", reason=str(error))
    except Exception:  # noqa: BLE001 - shown, and the process ends
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    run_process(main_and_end)
