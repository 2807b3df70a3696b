"""Triton ended while it has calls of inference under way, and the proof of that."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import numpy as np
import psutil
from tritonclient.grpc import InferenceServerClient, InferInput

from causemesh.errors import Fatal

_METRIC = re.compile(r'^(\w+)\{.*?model="([^"]+)".*?\} (\d+)$', re.MULTILINE)
_PENDING, _DONE = "nv_inference_pending_request_count", "nv_inference_request_success"
_STUB = "triton_python_backend_stub"  # the process that runs one model
_HELD_S = 60.0
_POLL_S = 0.02


class ModelCalls:
    """What a Triton server tells of its calls; `url` is its gRPC door, `metrics_url` the other."""

    def __init__(self, url: str, metrics_url: str) -> None:
        self._url = url
        self._metrics_url = metrics_url

    def done(self) -> int:
        """How many calls were answered since the server started; none while it is away."""
        return self._counted(_DONE)

    def waiting(self) -> int:
        """How many calls the server has taken and not begun to run."""
        return self._counted(_PENDING)

    def _counted(self, metric: str) -> int:
        return sum(count for name, _, count in self._metrics() if name == metric)

    def _metrics(self) -> list[tuple[str, str, int]]:
        try:
            text = httpx.get(f"{self._metrics_url}/metrics", timeout=2.0).text
        except httpx.TransportError:
            return []
        return [(name, model, int(count)) for name, model, count in _METRIC.findall(text)]

    @contextmanager
    def held(self, triton: psutil.Process) -> Iterator[int]:
        """Stop the model processes until calls wait in the server; how many do.

        A call of our own goes first, to be the one that runs: those that wait are the mesh's.
        Raises Fatal when none comes.
        """
        stubs = [one for one in triton.children(recursive=True) if _STUB.startswith(one.name())]
        models = sorted({model for _, model, _ in self._metrics()})
        if not stubs or not models:
            raise Fatal("Triton runs no model, so no call can be under way in it")
        for stub in stubs:
            stub.suspend()
        client: Any = InferenceServerClient(self._url)
        try:
            for model in models:
                _call(client, model)
            yield self._some_waiting()
        finally:
            client.close()

    def _some_waiting(self) -> int:
        deadline = time.monotonic() + _HELD_S
        while time.monotonic() < deadline:
            count = self.waiting()
            if count:
                return count
            time.sleep(_POLL_S)
        raise Fatal(f"no call came to Triton in {_HELD_S:.0f} s")


def _call(client: Any, model: str) -> None:
    """Ask for one score and do not wait for it."""
    (column,) = client.get_model_metadata(model).inputs
    rows = InferInput(column.name, [1, column.shape[-1]], column.datatype)
    rows.set_data_from_numpy(np.zeros((1, column.shape[-1]), np.float32))
    client.async_infer(model, [rows], lambda result, error: None)
    time.sleep(0.1)  # longer than Triton lets calls gather into one batch
