"""What a service is told from outside, and what it says when that is not enough."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError

from causemesh.catalogue import LAKE, SERVICES, TRANSFORMS
from causemesh.errors import Misdeclared
from causemesh.settings import API_PORTS, ServiceSettings
from services.billing.settings import BillingSettings


def settings(**told: object) -> ServiceSettings:
    return ServiceSettings.model_validate(told)


@pytest.mark.parametrize("token", ["", "fifteen-letters"])
def test_a_short_token_is_refused_with_a_way_to_make_one(token: str) -> None:
    with pytest.raises(Misdeclared, match=r"CAUSEMESH_API_TOKEN .* 16 characters.*token_urlsafe"):
        settings(api_token=token).token()


def test_sixteen_characters_are_a_token_and_are_not_shown() -> None:
    told = settings(api_token="sixteen-letters!")
    assert told.token() == "sixteen-letters!"
    assert "sixteen" not in repr(told)
    assert isinstance(told.api_token, SecretStr)


def test_a_project_file_is_found_or_the_message_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(Misdeclared, match=r"CAUSEMESH_PROJECT must name .* drift.yaml"):
        settings().project_file("drift.yaml")
    told = settings(project=tmp_path)
    with pytest.raises(Misdeclared, match=r"drift.yaml is missing; see examples/flights/"):
        told.project_file("drift.yaml")
    (tmp_path / "drift.yaml").touch()
    assert told.project_file("drift.yaml") == tmp_path / "drift.yaml"


def test_every_service_has_a_port_of_its_own() -> None:
    assert tuple(API_PORTS) == (*SERVICES, LAKE, TRANSFORMS)
    assert len(set(API_PORTS.values())) == len(SERVICES) + 2


def test_the_environment_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAUSEMESH_PARTITIONS", "7")
    monkeypatch.setenv("CAUSEMESH_KAFKA_BOOTSTRAP", "elsewhere:9092")
    assert (ServiceSettings().partitions, ServiceSettings().kafka_bootstrap) == (
        7,
        "elsewhere:9092",
    )


def test_an_empty_variable_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PARTITIONS", "STRIPE_URL", "STRIPE_KEY"):
        monkeypatch.setenv(f"CAUSEMESH_{name}", "")
    assert ServiceSettings().partitions is None
    with pytest.raises(Misdeclared, match="set CAUSEMESH_STRIPE_KEY"):
        BillingSettings().payments_key()


@pytest.mark.parametrize(
    "told", [{"partitions": 0}, {"api_port": 70_000}, {"replication": 0}, {"log_level": "loud"}]
)
def test_what_is_out_of_bounds_is_refused(told: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        settings(**told)
