"""What every service is told from outside, read from `CAUSEMESH_*` environment variables."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from causemesh.errors import Misdeclared

API_PORTS = {
    "ingest": 8101,
    "features": 8102,
    "inference": 8103,
    "agents": 8104,
    "billing": 8105,
    "drift": 8106,
    "lake": 8107,
    "transforms": 8108,
}
"""The default port of each service's admin API."""

BusName = Literal["kafka", "pulsar"]


class ServiceSettings(BaseSettings):
    """Common settings; a service adds its own fields. The defaults fit the embedded cluster."""

    # `CAUSEMESH_PARTITIONS=` in an environment file is no value, not an empty one.
    model_config = SettingsConfigDict(
        env_prefix="CAUSEMESH_", extra="ignore", env_ignore_empty=True
    )

    bus: BusName = "kafka"
    kafka_bootstrap: str = "127.0.0.1:19092"
    pulsar_url: str = "pulsar://127.0.0.1:16650"
    pulsar_admin_url: str = "http://127.0.0.1:16080"
    registry_url: str = "http://127.0.0.1:18081/apis/ccompat/v7"
    postgres_url: str = Field(
        default="postgresql+asyncpg://causemesh@127.0.0.1:15432",
        description="The server, without a database: each service uses the one of its own name.",
    )
    project: Path | None = Field(
        default=None, description="Folder with the project's catalogue.yaml and service files."
    )
    partitions: int | None = Field(default=None, ge=1, le=1024)
    session_timeout_ms: int = Field(
        default=6_000,
        ge=1_000,
        description="A member that is silent for so long loses its partitions, and Postgres ends"
        " the transactions that it left open. Brokers refuse less than their"
        " group.min.session.timeout.ms, 6,000 unless set.",
    )
    replication: int = Field(default=1, ge=1)
    api_host: str = "127.0.0.1"
    api_port: int | None = Field(default=None, ge=1, le=65535)
    api_token: SecretStr = Field(
        default=SecretStr(""), description="Bearer token of the admin API; at least 16 characters."
    )
    service_url: str = Field(
        default="http://127.0.0.1:{port}",
        description="Where commands find the admin API of a {service}, with its default {port}.",
    )
    fault: str = Field(
        default="", description="For tests: `point:kill|pause|error[:count]`; see faultpoints."
    )
    otlp_endpoint: str = Field(
        default="", description="OTLP/HTTP collector, such as http://127.0.0.1:4318; off if empty."
    )
    trace_ratio: float = Field(
        default=0.001, ge=0, le=1, description="Share of the door's calls that begin a trace."
    )
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["json", "console"] = "json"

    def token(self) -> str:
        """The admin token. Raises Misdeclared when there is none worth the name."""
        token = self.api_token.get_secret_value()
        if len(token) < 16:
            raise Misdeclared(
                "CAUSEMESH_API_TOKEN must be set to at least 16 characters;"
                " make one with: python -c 'import secrets; print(secrets.token_urlsafe(24))'"
            )
        return token

    def project_file(self, name: str) -> Path:
        """A file of the project. Raises Misdeclared when there is no project or no such file."""
        if self.project is None:
            raise Misdeclared(f"CAUSEMESH_PROJECT must name the folder that holds {name}")
        path = self.project / name
        if not path.exists():
            raise Misdeclared(f"{path} is missing; see examples/flights/{name} for its form")
        return path
