"""Simple Feast feature views as Causemesh's: the newest value of each field.

Read is what `feast registry-dump` prints, so that Feast need not be installed here. A view of Feast
is a table of values that something else computed; here its source's rows come as events, and each
number of the newest event is a feature (`latest`), forgotten after the view's ttl.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from causemesh.errors import Misdeclared
from services.features.domain.definitions import NAME
from services.features.domain.parsing import parse_views

# Feast's value types that are one number. Times are not: they would be numbers of seconds.
_NUMBERS = frozenset({"INT32", "INT64", "FLOAT", "DOUBLE", "BOOL"})
_PLACES = ("featureViews", "streamFeatureViews", "onDemandFeatureViews")
_SECONDS = re.compile(r"(\d+)(?:\.0+)?s\Z")


@dataclass(frozen=True)
class Imported:
    """A document for features.yaml, and what has no counterpart, by name, with the reason."""

    document: dict[str, Any]
    left_out: dict[str, str] = field(default_factory=dict)


def imported(dump: str, events: Mapping[str, str] | None = None) -> Imported:
    """The views of a registry dump (JSON); `events` are event types by the name of a source.

    An event type is otherwise named like the source. Raises Misdeclared for what is no dump, and
    when nothing in it can be taken.
    """
    try:
        registry = json.loads(dump)
    except json.JSONDecodeError as error:
        raise Misdeclared(f"not the JSON that `feast registry-dump` prints: {error}") from error
    if not isinstance(registry, dict) or "featureViews" not in registry:
        raise Misdeclared("no `featureViews` in it: is it what `feast registry-dump` prints?")
    keys = {
        one["spec"]["name"]: one["spec"].get("joinKey", one["spec"]["name"])
        for one in registry.get("entities", [])
    }
    views: dict[str, Any] = {}
    left_out = {
        one["spec"]["name"]: "only views of a batch source are taken"
        for place in _PLACES[1:]
        for one in registry.get(place, [])
    }
    for one in registry["featureViews"]:
        spec = one["spec"]
        if not NAME.match(spec["name"]):
            left_out[spec["name"]] = f"the name must match {NAME.pattern}"
            continue
        body, missing = _view(spec, keys, events or {})
        left_out |= {f"{spec['name']}.{name}": reason for name, reason in missing.items()}
        if body["features"]:
            views[spec["name"]] = body
        else:
            left_out[spec["name"]] = "it has no field that is a number"
    if not views:
        raise Misdeclared(f"nothing in it can be taken: {left_out}")
    document = {"views": views}
    parse_views(document)  # refuses what the engine would refuse
    return Imported(document, left_out)


def _view(
    spec: Mapping[str, Any], keys: Mapping[str, str], events: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, str]]:
    source = spec.get("batchSource", {})
    origin = str(source.get("name", spec["name"]))
    renamed = {new: old for old, new in source.get("fieldMapping", {}).items()}
    missing: dict[str, str] = {}
    features: dict[str, list[str]] = {}
    columns: dict[str, str] = {}
    for one in spec.get("features", []):
        name, kind = one["name"], one.get("valueType", "INVALID")
        if kind not in _NUMBERS:
            missing[name] = f"{kind} is no number"
        elif not NAME.match(name):
            missing[name] = f"the name must match {NAME.pattern}"
        else:
            features[name] = ["latest"]
            if name in renamed:
                columns[name] = '"' + renamed[name].replace('"', '""') + '"'
    body: dict[str, Any] = {
        "event": events.get(origin, origin),
        "entity": [keys.get(name, name) for name in spec.get("entities", [])],
        "scope": "shared",
        "features": features,
    }
    if columns:
        body["columns"] = columns
    if ttl := _ttl(spec):
        body["retention"] = ttl
    return body, missing


def _ttl(spec: Mapping[str, Any]) -> str | None:
    """Feast's time to live as a duration; none where it is zero, which means for ever."""
    text = str(spec.get("ttl", "0s"))
    found = _SECONDS.match(text)
    if found is None:
        raise Misdeclared(f"view {spec['name']!r}: a ttl of {text} is not whole seconds")
    return f"{int(found[1])}s" if int(found[1]) else None
