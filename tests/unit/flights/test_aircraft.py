"""The example of the guide to transforms: as it is written there, on landings."""

from __future__ import annotations

import re
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from causemesh.catalogue import Catalogue
from services.features.domain.parsing import parse_views
from services.features.registration import check_views
from services.features.transforms.loading import Event, load_function

ROOT = Path(__file__).parents[3]
GUIDE = (ROOT / "docs" / "guides" / "transforms.md").read_text()
DECLARATION, VIEW = re.findall(r"```yaml\n(.*?)```", GUIDE, re.DOTALL)
NOON = datetime(2013, 1, 1, 12, tzinfo=UTC)


@pytest.fixture
def catalogue(tmp_path: Path) -> Catalogue:
    """The flights with what the guide adds."""
    project = tmp_path / "flights"
    shutil.copytree(ROOT / "examples" / "flights", project)
    with (project / "catalogue.yaml").open("a") as file:
        file.write(DECLARATION)
    return Catalogue.load([project])


def landing(flight: str, hours: float, delay: int) -> Event:
    at = NOON + timedelta(hours=hours)
    fields = {"flight_id": flight, "tail": "N1", "arrival_delay_minutes": delay}
    return Event("flight_landed", {**fields, "occurred_at": at})


async def test_a_plane_brings_its_delay_along(catalogue: Catalogue) -> None:
    turned = load_function(catalogue.transforms["aircraft_turned"])
    table: dict[str, Any] = {}
    made = []
    # C overtook B on the way
    for event in (landing("A", 0, 40), landing("C", 6, 5), landing("B", 3, 25), landing("D", 8, 0)):
        made += [one async for one in turned(event, table)]
    told = [
        (one["flight_id"], one["previous_flight_id"], one["previous_delay_minutes"], one["leg"])
        for one in made
    ]
    assert told == [("C", "A", 40, 2), ("B", "C", 5, 3), ("D", "C", 5, 4)]
    assert (made[0]["recovered_minutes"], made[0]["between_minutes"]) == (35, 360.0)
    record = catalogue.topic("events.aircraft_turned").record
    ours = {"event_id", "tenant_id", "occurred_at", "cause"}
    assert {field["name"] for field in record["fields"]} - ours == set(made[0])


def test_the_view_of_the_guide_can_be_served(catalogue: Catalogue) -> None:
    check_views(parse_views({"views": yaml.safe_load(VIEW)}), catalogue, 2**30)
