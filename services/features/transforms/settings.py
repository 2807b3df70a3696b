"""Settings of the transforms' process, beside the common ones."""

from __future__ import annotations

from pydantic import Field

from causemesh.settings import API_PORTS, ServiceSettings


class TransformSettings(ServiceSettings):
    """See the fields; read from CAUSEMESH_*."""

    api_port: int | None = Field(default=API_PORTS["transforms"], ge=1, le=65535)
    transforms_timeout_s: float = Field(
        default=30.0, gt=0, description="A function that takes longer for an event has failed."
    )
    transforms_batch: int = Field(
        default=500, ge=1, description="At most so many events are applied before they are stored."
    )
