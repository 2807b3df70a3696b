"""Wires the skew monitor beside the writer: a stage of its own, off unless a share is sampled."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from pyiceberg.catalog import Catalog

from causemesh.catalogue import LAKE
from causemesh.errors import Misdeclared
from causemesh.lake.definitions import LakeDefinition
from causemesh.lake.reading import Lake
from causemesh.migrations import migrate
from causemesh.periodic import patiently
from causemesh.positions_sql import SqlPositionStore
from causemesh.runner import Limits, Stage
from causemesh.service import Service
from causemesh.sql import open_engine
from services.features.lake.settings import LakeWriterSettings
from services.features.lake.skewing import SKEW, SkewLimits, SkewMonitor
from services.features.offline.definitions import Definitions
from services.features.offline.logged import PREDICTIONS
from services.features.offline.skew import SkewCheck
from services.features.settings import FeatureSettings

_FEATURES = "features"
GROUP = "lake-skew"


@asynccontextmanager
async def skew_monitor(
    service: Service, settings: LakeWriterSettings, catalog: Catalog, definition: LakeDefinition
) -> AsyncIterator[None]:
    """Add the monitor to the service, where it is on.

    Its positions and what waits lie in the database of features, whose code this is: the lake's
    database holds the tables' catalog alone. Raises Misdeclared without a project.
    """
    if not settings.skew_share:
        yield
        return
    if settings.project is None:
        raise Misdeclared("CAUSEMESH_PROJECT must name the folder that holds features.yaml")
    check = SkewCheck(
        Lake(catalog, definition),
        Definitions.of(settings.project, partitions=settings.partitions),
        round(FeatureSettings().slice_seconds * 1e6),
    )
    limits = SkewLimits(
        settings.skew_share, settings.skew_wait_seconds, settings.skew_every_seconds
    )
    engine = open_engine(f"{settings.postgres_url}/{_FEATURES}", GROUP, settings.session_timeout_ms)
    try:
        await patiently(lambda: migrate(_FEATURES, engine))
        service.runner(
            Stage(LAKE, GROUP, (PREDICTIONS,), (SKEW,)),
            lambda partition: SkewMonitor(
                check.check,
                partition,
                limits=limits,
                clock=service.clock,
                outcomes=service.metrics.outcomes,
            ),
            Limits(max_records=20_000, gather_s=1.0, commit_every_s=5.0),
            store=SqlPositionStore(engine),
        )
        yield
    finally:
        await engine.dispose()
