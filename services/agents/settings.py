"""Settings of agents, beside the common ones, and the project's workflows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from causemesh.errors import Misdeclared
from causemesh.settings import ServiceSettings
from services.agents.domain.review import ReviewWorkflow

_HOUR_US = 3_600_000_000
_Score = Annotated[float, Field(allow_inf_nan=False)]


class AgentsSettings(ServiceSettings):
    """See the fields; read from CAUSEMESH_*."""

    timeout_check_s: float = Field(
        default=1.0, gt=0, description="How often reviews are looked through for those now due."
    )

    def review(self) -> ReviewWorkflow:
        """The review workflow of the project's agents.yaml. Raises Misdeclared."""
        return read_review(self.project_file("agents.yaml"))


class _Review(BaseModel):
    model_config = ConfigDict(extra="forbid")

    model: str = Field(min_length=1)
    band: list[_Score] = Field(min_length=2, max_length=2)
    timeout_hours: float = Field(gt=0, le=24 * 366)
    default_decision: str = Field(min_length=1)

    @field_validator("band")
    @classmethod
    def _rising(cls, band: list[float]) -> list[float]:
        if band[0] > band[1]:
            raise ValueError("the lower score comes first")
        return band


class _Workflows(BaseModel):
    model_config = ConfigDict(extra="forbid")

    review: _Review


class _AgentsFile(BaseModel):
    model_config = ConfigDict(extra="forbid")

    workflows: _Workflows


def read_review(path: Path) -> ReviewWorkflow:
    """The review workflow in a file. Raises Misdeclared naming the entry and what is wrong."""
    try:
        told = _AgentsFile.model_validate(yaml.safe_load(path.read_text())).workflows.review
    except yaml.YAMLError as error:
        raise Misdeclared(f"{path} is not YAML: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        entry = ".".join(map(str, first["loc"])) or "the file"
        raise Misdeclared(
            f"{path}: {entry}: {first['msg']}; see examples/flights/agents.yaml for its form"
        ) from error
    low, high = told.band
    timeout_us = round(told.timeout_hours * _HOUR_US)
    return ReviewWorkflow(told.model, low, high, timeout_us, told.default_decision)
