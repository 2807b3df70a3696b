"""The runner: the cause protocol between a broker and a service's pure code."""

from causemesh.runner.batch import NEVER, Batch, Emission, Outgoing, Processor
from causemesh.runner.emitter import Emitter
from causemesh.runner.observer import Observer, UnitReport
from causemesh.runner.runner import Runner
from causemesh.runner.stage import Limits, Stage
from causemesh.runner.worker import PartitionWorker

__all__ = [
    "NEVER",
    "Batch",
    "Emission",
    "Emitter",
    "Limits",
    "Observer",
    "Outgoing",
    "PartitionWorker",
    "Processor",
    "Runner",
    "Stage",
    "UnitReport",
]
