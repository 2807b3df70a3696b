"""docs/asyncapi.yaml from the catalogue: `python -m causemesh.asyncapi [PROJECT ...]`.

An AsyncAPI 3 document: a channel a topic, a message a record, an operation for each party that
sends to or receives from a topic. With mesh projects (folders with a catalogue.yaml) it also has
the topics of their event types.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from causemesh.catalogue import WATERMARK, Catalogue, Schema, Topic
from causemesh.settings import ServiceSettings

Document = dict[str, Any]

_HEAD = "# Made from schemas/ by `make docs`; a contract test fails when the two differ.\n"
_ABOUT = """
The topics of a Causemesh mesh. Values are Avro behind Confluent's header (a zero byte and the
schema id in four bytes), keys are UTF-8 text; a record without a key stays on its cause's partition
number. The party `external` is every producer outside the mesh, `people` are readers outside it. A
mesh project adds inbox.<type> and events.<type> for each of its event types, and
`python -m causemesh.asyncapi PROJECT` prints the document with them.
"""
_AVRO = "application/vnd.apache.avro+json;version=1.9.0"
_BINDING = {"bindingVersion": "0.5.0"}
# The catalogue names no sources of this topic, features does: the re-keyed topics of its project.
_SOURCES_OF_THE_PROJECT = frozenset(["features.inputs.v1"])


def document(catalogue: Catalogue) -> Document:
    """The AsyncAPI document."""
    topics = catalogue.topics.values()
    watermark = _message(catalogue.controls[WATERMARK], WATERMARK, "RecordNameStrategy")
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "Causemesh",
            "version": version("causemesh"),
            "description": " ".join(_ABOUT.split()),
            "license": {"name": "Apache-2.0"},
        },
        "defaultContentType": "application/vnd.apache.avro",
        "servers": {"kafka": _server()},
        "channels": {topic.name: _channel(topic) for topic in topics},
        "operations": dict(pair for topic in topics for pair in _operations(topic)),
        "components": {"messages": {"Watermark": watermark}},
    }


def render(catalogue: Catalogue) -> str:
    """The document as YAML."""
    text = yaml.dump(
        document(catalogue), Dumper=_Whole, sort_keys=False, allow_unicode=True, width=100
    )
    return _HEAD + text


class _Whole(yaml.SafeDumper):
    """Writes what several records share (the envelope) out in each: aliases are hard to read."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _server() -> Document:
    # The defaults, not this process's settings: the document must not depend on who makes it.
    told = ServiceSettings.model_fields
    registry = {
        "schemaRegistryUrl": told["registry_url"].default,
        "schemaRegistryVendor": "confluent",
    }
    return {
        "host": told["kafka_bootstrap"].default,
        "protocol": "kafka",
        "description": "The embedded cluster; CAUSEMESH_KAFKA_BOOTSTRAP names another.",
        "bindings": {"kafka": {**registry, **_BINDING}},
    }


def _channel(topic: Topic) -> Document:
    message = _message(topic.record, topic.subject, "TopicNameStrategy")
    message["x-compatibility"] = topic.compatibility
    message["bindings"]["kafka"]["key"] = {"type": "string", "description": topic.key}
    messages = {topic.record["name"]: message}
    if topic.sources or topic.name in _SOURCES_OF_THE_PROJECT:
        messages["Watermark"] = {"$ref": "#/components/messages/Watermark"}
    kafka = {
        "topic": topic.name,
        "partitions": topic.partitions,
        "topicConfiguration": _configuration(topic),
    }
    return {
        "address": topic.name,
        "description": topic.about,
        "tags": [{"name": topic.form}, {"name": f"owner:{topic.owner}"}],
        "messages": messages,
        "bindings": {"kafka": {**kafka, **_BINDING}},
    }


def _configuration(topic: Topic) -> Document:
    settings = topic.broker_settings()
    numbers = {name: int(value) for name, value in settings.items() if value.isdigit()}
    return {**settings, **numbers, "cleanup.policy": [settings["cleanup.policy"]]}


def _message(record: Schema, subject: str, lookup: str) -> Document:
    registry = {
        "schemaIdLocation": "payload",
        "schemaIdPayloadEncoding": "confluent",
        "schemaLookupStrategy": lookup,
    }
    return {
        "name": f"{record['namespace']}.{record['name']}",
        "summary": record.get("doc", ""),
        "payload": {"schemaFormat": _AVRO, "schema": record},
        "bindings": {"kafka": {**registry, **_BINDING}},
        "x-subject": subject,
    }


def _operations(topic: Topic) -> Iterator[tuple[str, Document]]:
    parties = (("send", topic.producers), ("receive", topic.consumers))
    for action, names in parties:
        for name in names:
            operation = {
                "action": action,
                "channel": {"$ref": f"#/channels/{topic.name}"},
                "tags": [{"name": name}],
            }
            yield f"{name}.{action}.{topic.name}", operation


if __name__ == "__main__":
    sys.stdout.write(render(Catalogue.load([Path(project) for project in sys.argv[1:]])))
