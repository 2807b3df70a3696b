"""Settings of inference, beside the common ones."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from causemesh.settings import ServiceSettings


class InferenceSettings(ServiceSettings):
    """See the fields; read from CAUSEMESH_*."""

    triton_url: str = Field(default="127.0.0.1:18001", description="Triton's gRPC address.")
    triton_models: Path = Field(
        default=Path(".causemesh/triton/models"),
        description="Triton's model repository, shared with it.",
    )
    lanes: list[str] = Field(default=["realtime"], min_length=1)
    max_batch: int = Field(default=256, ge=1, le=1024, description="Rows a model call.")
    calls_in_flight: int = Field(default=4, ge=1, description="Model calls at once, a partition.")
    call_timeout_s: float = Field(default=30.0, gt=0)
