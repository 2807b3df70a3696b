"""The composition root of agents: `python -m services.agents.app`."""

from __future__ import annotations

from causemesh.runner import Limits, Stage
from causemesh.service import open_service, run_process
from services.agents.api import routes
from services.agents.decisions import Decisions
from services.agents.events import REVIEWS, RUNS
from services.agents.handlers import PREDICTIONS, ReviewOpener
from services.agents.settings import AgentsSettings
from services.agents.store import RunStore
from services.agents.timeouts import TimeOuts

GROUP = "agents"


async def main() -> None:
    """Wire and serve."""
    settings = AgentsSettings()
    workflow = settings.review()
    async with open_service("agents", settings) as service:
        outcomes = service.metrics.outcomes
        store = RunStore(service.engine)
        decisions = Decisions(service.engine, store, workflow, outcomes)
        stage = Stage("agents", GROUP, (PREDICTIONS,), (RUNS, REVIEWS))
        service.runner(
            stage, lambda _: ReviewOpener(workflow, store, outcomes), Limits(gather_s=0.5)
        )
        time_outs = TimeOuts(
            decisions,
            service.store,
            group=GROUP,
            partitions=service.catalogue.topic(PREDICTIONS).partitions,
            clock=service.clock,
            every_s=settings.timeout_check_s,
        )
        drain = service.outbox((RUNS, REVIEWS))
        api = routes(store, decisions, service.clock)
        await service.serve([api], [drain.run, time_outs.run])


if __name__ == "__main__":
    run_process(main)
