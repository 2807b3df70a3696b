"""Settings of the lake's writer, beside the common ones and those of where the lake is."""

from __future__ import annotations

from pydantic import Field

from causemesh.settings import ServiceSettings


class LakeWriterSettings(ServiceSettings):
    """See the fields; read from CAUSEMESH_*."""

    lake_commit_seconds: float = Field(
        default=30.0, gt=0, description="Records wait at most so long for their snapshot."
    )
    lake_commit_rows: int = Field(
        default=200_000, ge=1, description="So many records of a table are committed at once."
    )
    lake_commit_bytes: int = Field(
        default=128 << 20, ge=1 << 20, description="Or so many bytes of all tables in memory."
    )
    lake_position_seconds: float = Field(
        default=600.0,
        gt=0,
        description="A position that moved over nothing but watermarks is committed so often.",
    )
    lake_upkeep_seconds: float = Field(
        default=3_600.0, ge=0, description="Compaction, retention, expiry so often; 0 for never."
    )
    skew_share: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Share of the served vectors that are held to the lake; 0 for none.",
    )
    skew_wait_seconds: float = Field(
        default=120.0,
        ge=0,
        description="A served vector waits so long: what was late for it must be in the lake.",
    )
    skew_every_seconds: float = Field(
        default=300.0, gt=0, description="Vectors that wait are compared so often."
    )
