"""The model server behind a small protocol."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, Protocol

import grpc
import numpy as np
import numpy.typing as npt
from tritonclient.grpc import InferInput, InferRequestedOutput
from tritonclient.grpc.aio import InferenceServerClient
from tritonclient.utils import InferenceServerException

from causemesh.errors import MeshError, Retryable
from causemesh.faultpoints import Point, reach
from causemesh.triton_models import write_model

_AWAY = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED")
_NOT_LOADED = ("is not found", "is not ready", "unknown model", "has no available versions")


class ModelError(MeshError):
    """The model itself refused these rows."""


class ModelServer(Protocol):
    """Loads and runs models."""

    async def load(self, name: str, onnx: bytes, width: int) -> None:
        """Make a model of `width` float32 inputs answer under `name`."""

    async def infer(self, name: str, rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        """One score a row."""


class Triton:
    """Triton over gRPC with a repository folder that it shares with us."""

    def __init__(self, url: str, repository: Path, timeout_s: float) -> None:
        self._client: Any = InferenceServerClient(url)
        self._repository = repository
        self._timeout_s = timeout_s

    async def load(self, name: str, onnx: bytes, width: int) -> None:
        """See `ModelServer.load`. Raises Retryable when Triton is away, ModelError when it can't
        serve the model."""
        await asyncio.to_thread(write_model, self._repository, name, onnx, width)
        try:
            await self._client.load_model(name, client_timeout=self._timeout_s)
        except (InferenceServerException, grpc.RpcError) as error:
            raise _told(error) from error

    async def infer(self, name: str, rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        """See `ModelServer.infer`. Raises Retryable when Triton or the model is away (a restarted
        server has no models loaded), ModelError when the model refuses the rows."""
        tensor = InferInput("features", list(rows.shape), "FP32")
        tensor.set_data_from_numpy(rows)
        reach(Point.INFERENCE_ASKING)
        try:
            answer = await self._client.infer(
                name,
                [tensor],
                outputs=[InferRequestedOutput("score")],
                client_timeout=self._timeout_s,
            )
        except (InferenceServerException, grpc.RpcError) as error:
            raise _told(error) from error
        reach(Point.INFERENCE_ANSWERED)
        scores: npt.NDArray[np.float64] = answer.as_numpy("score").reshape(-1).astype(np.float64)
        return scores

    async def close(self) -> None:
        """Close the connection."""
        await self._client.close()


def _told(error: Exception) -> MeshError:
    """An error of the client as ours: the server away, the model not loaded, or refused rows."""
    text = str(error)
    status = error.status() if isinstance(error, InferenceServerException) else ""
    if not status or any(code in str(status) for code in _AWAY):
        return Retryable(f"Triton is away: {text}", retry_after=1.0)
    if any(sign in text for sign in _NOT_LOADED):
        return NotLoaded(f"Triton has not loaded the model: {text}", retry_after=0.2)
    return ModelError(text[:300])


class NotLoaded(Retryable):
    """The server runs but does not have the model (it was restarted)."""
