"""Settings of drift, beside the common ones. What alerts is in the project's drift.yaml."""

from __future__ import annotations

from pydantic import Field

from causemesh.settings import ServiceSettings


class DriftSettings(ServiceSettings):
    """See the fields; read from CAUSEMESH_*."""

    version_wait_s: float = Field(
        default=60.0, ge=0, description="How long a prediction waits for its version to be known."
    )
    close_every_s: float = Field(default=1.0, gt=0, description="How often days are looked for.")
    keep_days: int = Field(
        default=30,
        ge=1,
        description="Event-time days that scores, counts and labels are kept once they can't count"
        " any more; a label that comes so long before its prediction is lost.",
    )
