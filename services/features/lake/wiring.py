"""Wires the writer: a stage for each partition count, one store for all."""

from __future__ import annotations

from collections.abc import Mapping

from causemesh.catalogue import LAKE, Catalogue
from causemesh.lake.definitions import LakeDefinition, define_lake
from causemesh.lake.opening import open_catalog
from causemesh.lake.settings import LakeSettings, catalog_on
from causemesh.runner import Limits, Stage
from causemesh.service import Service
from services.features.lake.decoding import WidestDecoder
from services.features.lake.settings import LakeWriterSettings
from services.features.lake.skew_wiring import skew_monitor
from services.features.lake.store import FlushLimits, LakeStore
from services.features.lake.upkeep import Keeper
from services.features.lake.writing import LakeWriter

_GATHER_S = 2.0
"""A snapshot is made much later, and small units cost twice as much a record (measured)."""


async def serve(service: Service, settings: LakeWriterSettings) -> None:
    """Serve until a signal, then commit what waits."""
    catalogue = service.catalogue
    definition = define_lake(catalogue, settings.project)
    catalog = open_catalog(lake_of(settings))
    groups = groups_of(catalogue, definition)
    store = LakeStore(
        catalog,
        catalogue,
        definition,
        groups,
        clock=service.clock,
        limits=FlushLimits(
            settings.lake_commit_seconds,
            settings.lake_commit_rows,
            settings.lake_commit_bytes,
            settings.lake_position_seconds,
        ),
        outcomes=service.metrics.outcomes,
    )
    service.decoder = WidestDecoder(service.decoder, service.registry)
    for group, topics in groups.items():
        service.runner(
            Stage(LAKE, group, topics),
            lambda _: LakeWriter(catalogue, definition),
            Limits(max_records=20_000, gather_s=min(_GATHER_S, settings.lake_commit_seconds / 10)),
            store=store,
        )
    tasks = [store.run]
    if settings.lake_upkeep_seconds:
        keeper = Keeper(catalog, definition, service.clock, settings.lake_upkeep_seconds)
        tasks.append(keeper.run)
    try:
        async with skew_monitor(service, settings, catalog, definition):
            await service.serve((), tasks)
        await store.flush()
    finally:
        catalog.close()


def lake_of(settings: LakeWriterSettings) -> LakeSettings:
    """Where the lake is: as CAUSEMESH_LAKE_* say, else in the mesh's Postgres."""
    told = LakeSettings()
    if not told.catalog:
        told = told.model_copy(update={"catalog": catalog_on(settings.postgres_url)})
    return told.checked()


def groups_of(catalogue: Catalogue, definition: LakeDefinition) -> Mapping[str, tuple[str, ...]]:
    """Consumer groups with their topics: those of one partition count are read together."""
    found: dict[int, list[str]] = {}
    for topic in definition.topics:
        found.setdefault(catalogue.topic(topic).partitions, []).append(topic)
    return {f"{LAKE}-{count}": tuple(topics) for count, topics in sorted(found.items())}
