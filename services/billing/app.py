"""The composition root of billing: `python -m services.billing.app`."""

from __future__ import annotations

import yaml

from causemesh.log import LogReader
from causemesh.runner import Limits
from causemesh.service import Service, open_service, run_process
from services.billing.api import routes
from services.billing.books import Books, Terms
from services.billing.closing import MonthCloser
from services.billing.entitlements import ENTITLEMENTS, announce_changes
from services.billing.events import INVOICES
from services.billing.gateways import Payments, open_stripe
from services.billing.handlers import Metering, stage_of
from services.billing.proofs import Proofs
from services.billing.pushing import Pusher
from services.billing.reporting import BillingMetrics, Reporter
from services.billing.settings import BillingSettings
from services.billing.store import UsageStore


async def main() -> None:
    """Connect and serve."""
    settings = BillingSettings()
    key = settings.payments_key()
    async with (
        open_service("billing", settings) as service,
        open_stripe(key, settings.stripe_url) as payments,
    ):
        await serve(service, settings, payments)


async def serve(service: Service, settings: BillingSettings, payments: Payments) -> None:
    """Wire and serve on made connections."""
    terms = Terms.read(yaml.safe_load(settings.project_file("billing.yaml").read_text()))
    catalogue, engine, outcomes = service.catalogue, service.engine, service.metrics.outcomes
    stage = stage_of(catalogue, terms.config)
    await announce_changes(engine, terms.config, service.clock)
    service.runner(
        stage,
        lambda partition: Metering(
            stage,
            partition,
            catalogue=catalogue,
            decoder=service.decoder,
            config=terms.config,
            outcomes=outcomes,
        ),
        Limits(max_records=10_000, gather_s=0.5),
    )
    closer = MonthCloser(
        engine,
        service.store,
        terms,
        partitions=catalogue.topic(stage.shared[0]).partitions,
        clock=service.clock,
        every_s=settings.close_poll_s,
        outcomes=outcomes,
        tracer=service.tracer,
    )
    books = Books(engine)
    pusher = Pusher(
        engine,
        books,
        payments,
        clock=service.clock,
        every_s=settings.push_poll_s,
        outcomes=outcomes,
        tracer=service.tracer,
    )
    metrics = BillingMetrics(service.metrics.registry)
    reporter = Reporter(engine, metrics, clock=service.clock, every_s=settings.report_poll_s)
    drain = service.outbox([ENTITLEMENTS, INVOICES])
    proofs = Proofs(books, LogReader(service.bus, catalogue, service.decoder))
    api = routes(books, UsageStore(engine), proofs, terms.config)
    tasks = [closer.run, pusher.run, reporter.run, drain.run]
    await service.serve([api], tasks)


if __name__ == "__main__":
    run_process(main)
