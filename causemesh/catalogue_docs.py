"""docs/topics.md from the catalogue: `python -m causemesh.catalogue_docs`."""

from __future__ import annotations

import sys

from causemesh.catalogue import Catalogue, Topic

_HEAD = """# Topics

Made from `schemas/catalogue.yaml` by `make docs`; a contract test fails when the two differ. A mesh
project adds `inbox.<type>` and `events.<type>` for each of its event types.

| topic | form | key | record | from | to | what |
|---|---|---|---|---|---|---|
"""


def render(catalogue: Catalogue) -> str:
    """The page."""
    return _HEAD + "".join(_row(topic) for topic in catalogue.topics.values())


def _row(topic: Topic) -> str:
    cells = (
        f"`{topic.name}`",
        topic.form,
        topic.key,
        topic.record["name"],
        ", ".join(topic.producers),
        ", ".join(topic.consumers),
        topic.about,
    )
    return f"| {' | '.join(cells)} |\n"


if __name__ == "__main__":
    sys.stdout.write(render(Catalogue.load()))
