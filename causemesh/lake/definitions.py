"""What the lake holds: a table for each topic, and those that a project's lake.yaml declares.

    curated:
      predictions:                        # the table curated.predictions
        topic: inference.predictions.v1
        where: "outcome = 'predicted'"    # a row-wise SQL expression, as billing.yaml has them
        columns: {request_id: request_id, model: model, late_probability: score}
      invoice_lines:
        topic: billing.invoices.v1
        each: lines                       # one row an item of this array
        columns: {invoice_id: invoice_id, meter: lines.meter}

Every curated table has tenant_id, occurred_at, event_id and the record's place in the log besides.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from causemesh.catalogue import Catalogue, Topic
from causemesh.errors import Misdeclared
from causemesh.expressions import check_expression

Zone = Literal["raw", "decoded", "curated"]
LAKE_FILE = "lake.yaml"
ENVELOPE = ("tenant_id", "occurred_at", "event_id")
PLACE = ("_partition", "_position", "_appended_at")
_NAME = re.compile(r"^[a-z][a-z0-9_]{0,62}$")
_FIELDS = {"topic", "where", "each", "columns", "about"}


@dataclass(frozen=True)
class TableDefinition:
    """One table: the topic behind it and, for a curated one, its expressions.

    `aside` marks a table that only holds what did not decode of its topic: it is made when there
    is something, and says nothing about how far the topic has been read.
    """

    zone: Zone
    name: str
    topic: str
    retention_days: int
    columns: Mapping[str, str] = field(default_factory=dict)
    where: str | None = None
    each: str | None = None
    aside: bool = False
    about: str = ""

    @property
    def identifier(self) -> str:
        """zone.name, as the catalog and SQL have it."""
        return f"{self.zone}.{self.name}"


@dataclass(frozen=True)
class LakeDefinition:
    """All tables, by identifier."""

    tables: Mapping[str, TableDefinition]

    def of_topic(self, topic: str) -> list[TableDefinition]:
        """The tables that a topic fills, what did not decode first and curated before decoded."""
        order: Sequence[Zone] = ("raw", "curated", "decoded")
        mine = [one for one in self.tables.values() if one.topic == topic]
        return sorted(mine, key=lambda one: order.index(one.zone))

    def table(self, name: str) -> TableDefinition:
        """A table by its identifier, or the table of a topic or event type by its name.

        Raises Misdeclared when there is none.
        """
        for wanted in (name, f"decoded.{table_name(name)}", f"raw.{table_name(name)}",
                       f"decoded.{table_name(f'events.{name}')}", f"curated.{name}"):  # fmt: skip
            if wanted in self.tables:
                return self.tables[wanted]
        raise Misdeclared(f"the lake has no table {name!r}; causemesh lake tables lists them")

    @property
    def topics(self) -> list[str]:
        """The topics that are written to the lake."""
        return sorted({one.topic for one in self.tables.values()})


def table_name(topic: str) -> str:
    """A topic's name as a table's."""
    return topic.replace(".", "_")


def define_lake(catalogue: Catalogue, project: Path | None) -> LakeDefinition:
    """The lake of a catalogue and of a project's lake.yaml, if it has one. Raises Misdeclared."""
    tables: dict[str, TableDefinition] = {}
    for topic in catalogue.topics.values():
        if topic.lake:
            tables |= {one.identifier: one for one in _of_topic(topic)}
    path = project / LAKE_FILE if project is not None else None
    if path is not None and path.exists():
        document = yaml.safe_load(path.read_text()) or {}
        _refuse_unknown(path, "the file", document, {"curated"})
        for name, entry in (document.get("curated") or {}).items():
            made = _curated(path, catalogue, name, entry)
            tables[made.identifier] = made
    return LakeDefinition(tables)


def _of_topic(topic: Topic) -> list[TableDefinition]:
    name, days = table_name(topic.name), topic.lake_retention_days
    if topic.form == "inbox":
        return [TableDefinition("raw", name, topic.name, days, about=topic.about)]
    return [
        TableDefinition("decoded", name, topic.name, days, about=topic.about),
        TableDefinition(
            "raw", name, topic.name, days, aside=True, about=f"What of {topic.name} did not decode."
        ),
    ]


def _curated(
    path: Path, catalogue: Catalogue, name: str, entry: Mapping[str, Any]
) -> TableDefinition:
    at = f"{path}: curated.{name}"
    if not _NAME.match(name):
        raise Misdeclared(f"{at}: use lower case letters, digits and underscores")
    _refuse_unknown(path, f"curated.{name}", entry, _FIELDS)
    topic = catalogue.topic(str(entry.get("topic", "")))
    if not topic.lake or topic.form == "inbox":
        raise Misdeclared(f"{at}: {topic.name} is not among the topics that the lake decodes")
    columns = {str(column): str(text) for column, text in (entry.get("columns") or {}).items()}
    taken = sorted(column for column in columns if column in (*ENVELOPE, *PLACE))
    if taken or not columns:
        raise Misdeclared(f"{at}: {', '.join(taken) or 'columns'}: every table has {ENVELOPE}")
    where, each = entry.get("where"), entry.get("each")
    for text in [*columns.values(), *([where] if where else [])]:
        wrong = check_expression(text)
        if wrong is not None:
            raise Misdeclared(f"{at}: {wrong}")
    return TableDefinition(
        "curated",
        name,
        topic.name,
        topic.lake_retention_days,
        columns,
        where,
        each,
        about=str(entry.get("about", "")),
    )


def _refuse_unknown(path: Path, where: str, entry: Any, known: set[str]) -> None:
    if not isinstance(entry, Mapping) or set(entry) - known:
        unknown = sorted(set(entry) - known) if isinstance(entry, Mapping) else entry
        raise Misdeclared(f"{path}: {where}: unknown {unknown}; known: {sorted(known)}")
