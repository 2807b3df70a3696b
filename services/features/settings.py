"""Settings of features, beside the common ones."""

from __future__ import annotations

from pydantic import Field

from causemesh.checkpoints import CheckpointSettings, open_files
from causemesh.settings import ServiceSettings


class FeatureSettings(ServiceSettings):
    """See the fields; read from CAUSEMESH_*."""

    slice_seconds: float = Field(
        default=60.0, gt=0, description="A replay request sees the events before its slice."
    )
    commit_every_units: int = Field(
        default=20, ge=1, description="Units of work between two checkpoints under load."
    )
    commit_every_s: float = Field(
        default=1.0, ge=0, description="Least seconds between two checkpoints under load."
    )
    checkpoints: str = Field(
        default=".causemesh/checkpoints",
        description="Where a partition's state goes that is too large for its row: a folder, or"
        " file:///folder, s3://bucket/folder?region=... Processes that share the work need storage"
        " that all of them reach.",
    )
    checkpoint_inline_kb: int = Field(
        default=256, ge=0, description="A state of up to so many KiB lies in its row, in Postgres."
    )
    memory_mb: int = Field(
        default=4096, ge=1, description="What the declared entities of all views may cost, MiB."
    )
    publish_vectors: bool = Field(
        default=True, description="Whether features.vectors.v1 is written."
    )
    publish_seconds: float = Field(
        default=1.0, ge=0, description="An entity's vector is published at most so often."
    )

    def checkpoint_files(self) -> CheckpointSettings:
        """Where large states go. Raises Misdeclared for a place that is none."""
        return CheckpointSettings(open_files(self.checkpoints), self.checkpoint_inline_kb * 1024)
