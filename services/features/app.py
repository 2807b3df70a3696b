"""The composition root of features: `python -m services.features.app`."""

from __future__ import annotations

from typing import cast

import yaml

from causemesh.log import LogReader
from causemesh.runner import Limits, Stage
from causemesh.service import open_service, run_process
from services.features.api import Sources, routes
from services.features.backfill.log_past import LogPast
from services.features.backfill.pasts import Pasts
from services.features.backfill.running import Backfiller, lake_of
from services.features.domain.feature_store import FeatureStore
from services.features.domain.parsing import parse_views
from services.features.domain.transforms import parse_transforms
from services.features.explaining import Explainer
from services.features.handlers import Join
from services.features.history import History
from services.features.lateness import LATE
from services.features.plan import REQUESTS, ROLLOUTS, VERSIONS, Plan, tasks_topic
from services.features.publishing import VECTORS
from services.features.registration import check_views
from services.features.rekey import Rekey
from services.features.rekeying import INPUTS
from services.features.settings import FeatureSettings

LANES = ("realtime",)


async def main() -> None:
    """Wire and serve."""
    settings = FeatureSettings()
    document = yaml.safe_load(settings.project_file("features.yaml").read_text())
    views = parse_views(document)
    plan = Plan.of(views, parse_transforms(document, FeatureStore(views).known_names))
    async with open_service("features", settings) as service:
        catalogue = service.catalogue = service.catalogue.with_sources(INPUTS, plan.rekeyed)
        check_views(views, catalogue, settings.memory_mb * 2**20)
        outcomes = service.metrics.outcomes
        if plan.rekeyed:
            service.runner(
                Stage("features", "features-rekey", plan.rekeyed, (INPUTS,)),
                lambda _: Rekey(plan.views),
                Limits(max_records=10_000, commit_every_s=0.2, bulk_gather_s=0.1),
            )
        stage = Stage(
            "features",
            "features",
            (REQUESTS, *([INPUTS] if plan.rekeyed else []), *plan.shared),
            (*map(tasks_topic, LANES), VECTORS, LATE),
            (*plan.broadcast, VERSIONS, ROLLOUTS),
        )
        log_past = LogPast(service.bus, catalogue, service.decoder)
        runner = service.runner(
            stage,
            lambda partition: Join(
                plan,
                catalogue,
                partition,
                slice_us=round(settings.slice_seconds * 1e6),
                clock=service.clock,
                publish_seconds=settings.publish_seconds if settings.publish_vectors else None,
                count=lambda kind, view, number: outcomes.labels(kind, view).inc(number),
                positions=lambda: runner.workers[partition].positions,
                ends=log_past.ends,
            ),
            Limits(
                max_records=20_000,
                commit_every_units=settings.commit_every_units,
                commit_every_s=settings.commit_every_s,
                bulk_gather_s=0.1,
            ),
            checkpoints=settings.checkpoint_files(),
        )

        def joins() -> dict[int, Join]:
            return {number: cast(Join, one.processor) for number, one in runner.workers.items()}

        def watermarks() -> dict[int, int]:
            return {number: one.watermarks.least() for number, one in runner.workers.items()}

        log = LogReader(service.bus, catalogue, service.decoder)
        explainer = Explainer(log, plan.views)
        sources = Sources(
            joins,
            watermarks,
            service.clock.now_us,
            lambda topic: catalogue.topic(topic).retention_days,
            catalogue.topic(REQUESTS).partitions,
            settings.memory_mb * 2**20,
        )
        history = History(log)
        find_past = lake_of(catalogue, settings.project, settings.postgres_url)
        pasts = Pasts(catalogue, log_past, find_past)
        backfiller = Backfiller(lambda: list(joins().values()), pasts, service.clock)
        await service.serve([routes(plan, sources, explainer, history)], [backfiller.run])


if __name__ == "__main__":
    run_process(main)
