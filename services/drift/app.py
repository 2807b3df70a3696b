"""The composition root of drift: `python -m services.drift.app`."""

from __future__ import annotations

import yaml

from causemesh.runner import Limits
from causemesh.service import Service, open_service, run_process
from services.drift.api import routes
from services.drift.closing import ALERTS, REPORTS, RETRAINING, DayCloser
from services.drift.domain.detectors import parse_drift
from services.drift.findings import Findings
from services.drift.handlers import PREDICTIONS, Monitor, stage_of
from services.drift.settings import DriftSettings
from services.drift.versions import VERSIONS, Versions


async def main() -> None:
    """Connect and serve."""
    settings = DriftSettings()
    async with open_service("drift", settings) as service:
        await serve(service, settings)


async def serve(service: Service, settings: DriftSettings) -> None:
    """Wire and serve on made connections."""
    config = parse_drift(yaml.safe_load(settings.project_file("drift.yaml").read_text()))
    catalogue, outcomes = service.catalogue, service.metrics.outcomes
    catalogue.require("drift", reads=[VERSIONS])
    versions = Versions(service.bus, catalogue, service.decoder, outcomes)
    stage = stage_of(catalogue)
    service.runner(
        stage,
        lambda _: Monitor(
            versions,
            clock=service.clock,
            version_wait_s=settings.version_wait_s,
            outcomes=outcomes,
        ),
        Limits(max_records=10_000, gather_s=0.5),
    )
    closer = DayCloser(
        service.engine,
        service.store,
        stage,
        partitions=catalogue.topic(PREDICTIONS).partitions,
        versions=versions,
        config=config,
        clock=service.clock,
        every_s=settings.close_every_s,
        keep_days=settings.keep_days,
        outcomes=outcomes,
    )
    drain = service.outbox([REPORTS, ALERTS, RETRAINING])
    api = routes(Findings(service.engine), versions)
    await service.serve([api], [versions.run, closer.run, drain.run])


if __name__ == "__main__":
    run_process(main)
