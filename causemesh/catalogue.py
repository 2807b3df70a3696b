"""The catalogue: every topic, its record, its owner and who may touch it.

`schemas/catalogue.yaml` declares the mesh's own topics. A mesh project (a folder with a
`catalogue.yaml` and `events/*.avsc`) adds event types; each event type `t` becomes two topics,
`inbox.t` (what producers write) and `events.t` (what the mesh believes). Topic creation, schema
registration, docs/topics.md and the start-up refusal are derived from here and nowhere else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

from causemesh.derived import Transform, check_input, read_transform, topics_of
from causemesh.errors import Misdeclared
from causemesh.schemas import check_record

Form = Literal["fact", "state", "inbox"]
Schema = dict[str, Any]

SERVICES = ("ingest", "features", "inference", "agents", "billing", "drift")
LAKE = "lake"
"""The process that writes topics to the data lake; features' code, with a name of its own."""
TRANSFORMS = "transforms"
"""The process of a project's custom transforms; features' code too."""
WATERMARK = "causemesh.Watermark"
DEADLETTERS = "mesh.deadletters.v1"
NO_TENANT = "-"
"""The tenant of records that belong to none, or to one that could not be read."""
_TOPIC_NAME = re.compile(r"^[a-z][a-z0-9_]*(\.[a-z][a-z0-9_]*)*(\.v[1-9][0-9]*)?$")
_TOPIC_FIELDS = {
    *("form", "record", "key", "owner", "producers", "consumers", "sources"),
    *("partitions", "retention_days", "compatibility", "lake", "lake_retention_days", "about"),
}
_EVENT_FIELDS = frozenset(
    [
        *("record", "key", "watermark", "lateness_seconds", "partitions", "retention_days"),
        *("lake", "lake_retention_days", "about", "transform"),
    ]
)
_OF_EVENT_TYPES = ("partitions", "retention_days", "lake", "lake_retention_days")
_PROJECT_FIELDS = frozenset(["event_types", "requests"])
_MICROS = 1_000_000


@dataclass(frozen=True)
class Topic:
    """One declared topic. `record` is the whole Avro schema of its values, envelope included.

    `lake` says whether the data lake holds it; there it stays for `lake_retention_days` of event
    time, whatever the broker keeps.
    """

    name: str
    form: Form
    record: Schema
    key: str
    owner: str
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    sources: tuple[str, ...]
    partitions: int
    retention_days: int
    compatibility: str
    about: str
    lake: bool = False
    lake_retention_days: int = 730

    @property
    def record_name(self) -> str:
        """Full name of the record, namespace included."""
        return f"{self.record['namespace']}.{self.record['name']}"

    @property
    def subject(self) -> str:
        """The registry subject (TopicNameStrategy)."""
        return f"{self.name}-value"

    @property
    def compacted(self) -> bool:
        """Whether only the newest record of a key is kept."""
        return self.form == "state"

    def broker_settings(self) -> dict[str, str]:
        """Topic settings for a Kafka broker. Retention goes by append time: a backdated event
        must not be deleted for its age."""
        settings = {"message.timestamp.type": "LogAppendTime", "max.message.bytes": "2097152"}
        if self.compacted:
            return {**settings, "cleanup.policy": "compact"}
        retention = str(self.retention_days * 86_400_000)
        return {**settings, "cleanup.policy": "delete", "retention.ms": retention}


@dataclass(frozen=True)
class Progress:
    """Who promises the progress of event time on an inbox topic.

    `watermark` is `clock` (the door does: wall clock minus `lateness_us`) or `source` (the producer
    writes watermarks itself, as a replay does).
    """

    watermark: Literal["clock", "source"] = "clock"
    lateness_us: int = 0


@dataclass(frozen=True)
class EventType:
    """A kind of event that users produce."""

    name: str
    key: str
    progress: Progress
    record: Schema

    @property
    def inbox(self) -> str:
        """The topic that producers write."""
        return f"inbox.{self.name}"

    @property
    def events(self) -> str:
        """The topic of validated, deduplicated facts."""
        return f"events.{self.name}"


@dataclass(frozen=True)
class Catalogue:
    """All declared topics and event types, and the records of control messages."""

    topics: Mapping[str, Topic]
    event_types: Mapping[str, EventType]
    controls: Mapping[str, Schema] = field(default_factory=dict)
    requests: Progress = Progress()
    transforms: Mapping[str, Transform] = field(default_factory=dict)
    """By the event type that they make, which is not among `event_types`."""

    @classmethod
    def load(cls, projects: Sequence[Path] = (), *, partitions: int | None = None) -> Catalogue:
        """Read the mesh's catalogue and those of `projects`.

        `partitions` overrides the default partition count of every topic that names none.
        Raises Misdeclared naming the file and what to change.
        """
        with resources.as_file(resources.files("schemas")) as folder:
            loader = _Loader(folder, partitions)
            loader.read_topics(folder / "catalogue.yaml")
            controls = {WATERMARK: loader.avsc(folder / "records" / "Watermark.avsc")}
            for project in projects:
                loader.read_project(Path(project))
        catalogue = cls(
            loader.topics, loader.event_types, controls, loader.requests, loader.transforms
        )
        catalogue._check()
        return catalogue

    def topic(self, name: str) -> Topic:
        """The declared topic `name`; raises Misdeclared when there is none."""
        try:
            return self.topics[name]
        except KeyError:
            raise Misdeclared(
                f"topic {name!r} is not in the catalogue; declare it in schemas/catalogue.yaml"
                " (or its event type in your project's catalogue.yaml)"
            ) from None

    def require(
        self, service: str, *, reads: Iterable[str] = (), writes: Iterable[str] = ()
    ) -> None:
        """Refuse a service that touches a topic it does not declare. Raises Misdeclared."""
        for name in reads:
            if service not in self.topic(name).consumers:
                raise Misdeclared(f"{service} reads {name} but is not among its consumers")
        for name in writes:
            if service not in self.topic(name).producers:
                raise Misdeclared(f"{service} writes {name} but is not among its producers")

    def source_partitions(self, name: str) -> list[tuple[str, int]]:
        """The (cause topic, partition) pairs whose watermarks travel on topic `name`."""
        pairs = [
            (source, partition)
            for source in self.topic(name).sources
            for partition in range(self.topic(source).partitions)
        ]
        return sorted(pairs)

    def with_sources(self, name: str, sources: Sequence[str]) -> Catalogue:
        """The same catalogue, with the watermarks of `sources` travelling on topic `name`.

        For internal topics whose sources are the users' choice.
        """
        changed = replace(self.topic(name), sources=tuple(sources))
        return replace(self, topics={**self.topics, name: changed})

    def _check(self) -> None:
        for topic in self.topics.values():
            if not _TOPIC_NAME.match(topic.name):
                raise Misdeclared(f"topic {topic.name!r}: use lower case and dots, owner.plural.v1")
            for source in topic.sources:
                self.topic(source)
            check_record(topic.record, columnar=topic.form != "inbox")


class _Loader:
    """Builds topics from files; keeps the envelope and the defaults at hand."""

    def __init__(self, folder: Path, partitions: int | None) -> None:
        self.folder = folder
        self.partitions = partitions
        self.defaults: dict[str, Any] = {}
        self.topics: dict[str, Topic] = {}
        self.event_types: dict[str, EventType] = {}
        self.transforms: dict[str, Transform] = {}
        self.requests = Progress()
        self.envelopes = {
            form: self.avsc(folder / "envelope" / f"{form}.avsc")["fields"]
            for form in ("fact", "external")
        }

    @staticmethod
    def avsc(path: Path) -> Schema:
        try:
            schema: Schema = json.loads(path.read_text())
        except FileNotFoundError:
            raise Misdeclared(f"{path} is missing; every record needs an .avsc file") from None
        except json.JSONDecodeError as error:
            raise Misdeclared(f"{path} is not JSON: {error}") from None
        return schema

    def read_topics(self, path: Path) -> None:
        document = yaml.safe_load(path.read_text())
        self.defaults = dict(document["defaults"])
        if self.partitions is not None:
            self.defaults["partitions"] = self.partitions
        for name, entry in document["topics"].items():
            _refuse_unknown(path, name, entry, _TOPIC_FIELDS)
            record = self.avsc(path.parent / "records" / f"{entry['record']}.avsc")
            self._add(name, entry, record)

    def read_project(self, project: Path) -> None:
        path = project / "catalogue.yaml"
        if not path.exists():
            raise Misdeclared(f"{path} is missing; a mesh project declares its event types there")
        document = yaml.safe_load(path.read_text()) or {}
        _refuse_unknown(path, "the file", document, _PROJECT_FIELDS)
        requests = document.get("requests") or {}
        _refuse_unknown(path, "requests", requests, {"watermark", "lateness_seconds"})
        self.requests = _progress(path, "requests", requests, 0)
        for name, entry in (document.get("event_types") or {}).items():
            _refuse_unknown(path, name, entry, _EVENT_FIELDS)
            self._add_event_type(path, name, entry)

    def _add_event_type(self, path: Path, name: str, entry: Mapping[str, Any]) -> None:
        if name in self.event_types or name in self.transforms or name == "requests":
            raise Misdeclared(f"event type {name!r} is declared twice (requests is the mesh's own)")
        record = self.avsc(path.parent / "events" / f"{entry['record']}.avsc")
        columns = {column["name"] for column in record["fields"]}
        if entry["key"] not in columns:
            raise Misdeclared(f"event type {name!r}: key {entry['key']!r} is not a field of it")
        if "transform" in entry:
            self._add_transform(path, name, entry, record)
            return
        kind = EventType(
            name,
            entry["key"],
            _progress(path, name, entry, 60),
            record,
        )
        self.event_types[name] = kind
        common = {key: entry[key] for key in _OF_EVENT_TYPES if key in entry}
        about = entry.get("about", "")
        inbox = {
            "form": "inbox",
            "owner": "ingest",
            "key": entry["key"],
            "producers": ["external", "ingest"],
            "consumers": ["ingest"],
            "sources": [kind.inbox],
            "about": f"{about} (as it came)",
        }
        events = {
            **inbox,
            "form": "fact",
            "producers": ["ingest"],
            "consumers": ["features", "drift", "billing", "agents"],
            "about": about,
        }
        self._add(kind.inbox, {**common, **inbox}, record)
        self._add(kind.events, {**common, **events}, record)

    def _add_transform(
        self, path: Path, name: str, entry: Mapping[str, Any], record: Schema
    ) -> None:
        transform = read_transform(path, name, entry)
        for one in transform.inputs:
            if f"events.{one}" not in self.topics:
                raise Misdeclared(f"{path}: {name}: declare its input {one} above it")
            check_input(path, transform, one, self.topics[f"events.{one}"].record)
        common = {key: entry[key] for key in _OF_EVENT_TYPES if key in entry}
        for topic, made in topics_of(transform, entry).items():
            if topic == transform.output:
                self._add(topic, {**common, **made}, record)
            else:
                self._add(
                    topic, made, self.avsc(self.folder / "records" / f"{made['record']}.avsc")
                )
        self.transforms[name] = transform

    def _add(self, name: str, entry: Mapping[str, Any], record: Schema) -> None:
        form: Form = entry["form"]
        envelope = self.envelopes["external" if form == "inbox" else "fact"]
        merged = {**self.defaults, **entry}
        lake = bool(merged["lake"])
        self.topics[name] = Topic(
            name=name,
            form=form,
            record={**record, "fields": [*envelope, *record["fields"]]},
            key=entry["key"],
            owner=entry["owner"],
            producers=tuple(entry["producers"]),
            consumers=(*entry["consumers"], *([LAKE] if lake else [])),
            sources=tuple(entry.get("sources", ())),
            partitions=int(merged["partitions"]),
            retention_days=int(merged["retention_days"]),
            compatibility=str(merged["compatibility"]),
            about=" ".join(str(entry.get("about", "")).split()),
            lake=lake,
            lake_retention_days=int(merged["lake_retention_days"]),
        )


def _progress(path: Path, name: str, entry: Mapping[str, Any], lateness_s: float) -> Progress:
    watermark = entry.get("watermark", "clock")
    if watermark not in ("clock", "source"):
        raise Misdeclared(f"{path}: {name}: watermark must be clock or source, not {watermark!r}")
    return Progress(watermark, round(float(entry.get("lateness_seconds", lateness_s)) * _MICROS))


def _refuse_unknown(path: Path, name: str, entry: Mapping[str, Any], known: Set[str]) -> None:
    unknown = set(entry) - known
    if unknown:
        raise Misdeclared(
            f"{path}: {name}: unknown settings {sorted(unknown)}; known: {sorted(known)}"
        )
