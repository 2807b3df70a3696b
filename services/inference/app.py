"""The composition root of inference: `python -m services.inference.app`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from causemesh.runner import Limits, Stage
from causemesh.service import open_service, run_process
from services.inference.api import Registry, routes
from services.inference.deployments import Deployments
from services.inference.gateways import Triton
from services.inference.handlers import PREDICTIONS, Predict
from services.inference.settings import InferenceSettings
from services.inference.store import ROLLOUTS, VERSIONS, ModelStore


def _of_lane(predict: Callable[[str], Predict], lane: str, _: int) -> Predict:
    return predict(lane)


async def main() -> None:
    """Wire and serve."""
    settings = InferenceSettings()
    async with open_service("inference", settings) as service:
        server = Triton(settings.triton_url, settings.triton_models, settings.call_timeout_s)
        store = ModelStore(service.engine)
        deployments = Deployments(store, server)

        def predict(lane: str) -> Predict:
            return Predict(
                lane,
                deployments,
                server,
                service.clock,
                max_batch=settings.max_batch,
                calls_in_flight=settings.calls_in_flight,
                outcomes=service.metrics.outcomes,
            )

        for lane in settings.lanes:
            tasks = (f"inference.tasks.{lane}.v1",)
            stage = Stage("inference", f"inference-{lane}", tasks, (PREDICTIONS,))
            service.runner(
                stage,
                partial(_of_lane, predict, lane),
                Limits(max_records=4_000, commit_every_s=0.2, bulk_gather_s=0.05),
            )
        drain = service.outbox([VERSIONS, ROLLOUTS])
        registry = Registry(store, deployments, server, service.catalogue, service.clock)
        try:
            await service.serve([routes(registry)], [drain.run])
        finally:
            await server.close()


if __name__ == "__main__":
    run_process(main)
