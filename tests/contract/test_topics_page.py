"""The published page says what the catalogue says."""

from __future__ import annotations

from pathlib import Path

from causemesh.catalogue import Catalogue
from causemesh.catalogue_docs import render


def test_topics_page_is_current() -> None:
    page = Path(__file__).parents[2] / "docs" / "topics.md"
    assert page.read_text() == render(Catalogue.load()), "run `make docs`"
