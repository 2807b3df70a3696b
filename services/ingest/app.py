"""The composition root of ingest: `python -m services.ingest.app`."""

from __future__ import annotations

from causemesh.client import REQUESTS, Client
from causemesh.codec.decode import Decoder
from causemesh.log import LogReader
from causemesh.runner import Limits, Stage
from causemesh.service import open_service, run_process
from causemesh.spans_sending import DoorSpans
from services.ingest.api import routes
from services.ingest.domain import MAX_VALUE_BYTES, Rules
from services.ingest.handlers import REJECTS, Door, target_of
from services.ingest.pruning import Pruner
from services.ingest.replies import Replies
from services.ingest.settings import IngestSettings
from services.ingest.store import IdStore

GROUP = "ingest"
_DAY_US = 86_400_000_000


async def main() -> None:
    """Wire and serve."""
    settings = IngestSettings()
    async with open_service("ingest", settings) as service:
        catalogue = service.catalogue
        everything, service.decoder = (
            service.decoder,
            Decoder(service.registry, max_value_bytes=MAX_VALUE_BYTES),
        )
        inboxes = (REQUESTS, *(kind.inbox for kind in catalogue.event_types.values()))
        writes = (*map(target_of, inboxes), REJECTS)
        stage = Stage("ingest", GROUP, inboxes, writes)
        ids = IdStore(service.engine)
        rules = Rules(settings.dedupe_days * _DAY_US, round(settings.future_tolerance_s * 1e6))
        service.runner(
            stage,
            lambda _: Door(
                catalogue,
                inboxes,
                ids=ids,
                rules=rules,
                clock=service.clock,
                outcomes=service.metrics.outcomes,
            ),
            Limits(max_records=10_000, commit_every_s=0.2, bulk_gather_s=0.1),
        )
        client = Client(catalogue, service.registry, service.producer())
        log = LogReader(service.bus, catalogue, everything)
        replies = Replies(service.bus, catalogue, everything)
        pruner = Pruner(
            ids,
            service.store,
            catalogue=catalogue,
            group=GROUP,
            inboxes=inboxes,
            rules=rules,
            clock=service.clock,
        )
        spans = DoorSpans(service.tracer, settings.bus, service.metrics.call_done)
        api = routes(client, replies, log, service.producer(), settings, spans=spans)
        await service.serve([api], [replies.run, pruner.run])


if __name__ == "__main__":
    run_process(main)
