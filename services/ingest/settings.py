"""Settings of ingest, beside the common ones."""

from __future__ import annotations

from pydantic import Field

from causemesh.settings import ServiceSettings


class IngestSettings(ServiceSettings):
    """See the fields; read from CAUSEMESH_*."""

    dedupe_days: int = Field(default=32, ge=1, description="How long an event id is remembered.")
    future_tolerance_s: float = Field(
        default=300.0, ge=0, description="How far ahead of the broker's clock an event may be."
    )
    max_events_per_call: int = Field(default=1_000, ge=1, le=10_000)
