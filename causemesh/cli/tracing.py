"""`causemesh trace`: from an id to its causes and effects, as a tree."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import polars as pl
from rich.console import Console
from rich.tree import Tree

from causemesh.cli.context import Apis, Connections, apis_at, connections
from causemesh.cli.output import readable
from causemesh.errors import Misdeclared
from causemesh.log import Span
from causemesh.trace import Node

_SAMPLES = 2
_TASK = "features_as_of"


@dataclass
class Step:
    """A line of the tree: what it is, what is known of it, and what lies below."""

    title: str
    facts: dict[str, Any] = field(default_factory=dict)
    below: list[Step] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        """As JSON."""
        below = [step.document() for step in self.below]
        return {"title": self.title, **self.facts, "below": below}


@dataclass
class Traced:
    """The answer: a tree, and for a verified line whether the log gives the same."""

    root: Step
    equal: bool | None = None

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {"equal": self.equal, "tree": self.root.document()}


async def trace(home: Path, wanted: str, *, verify: bool) -> Traced:
    """Trace an invoice line, or any record by an id it carries."""
    apis = apis_at(home)
    with apis.client("billing") as billing:
        answer = billing.get(f"/v1/lines/{wanted}")
        if answer.status_code == 200:
            line = answer.json()
            check = _asked(billing, f"/v1/lines/{wanted}/verify") if verify else None
            return await _line(home, apis, line, check)
    if verify:
        raise Misdeclared(f"--verify takes an invoice line's id; {wanted!r} is none")
    async with connections(home) as open_to:
        found = await open_to.tracer.find(wanted)
        if not found:
            raise Misdeclared(f"no record of the log carries the id {wanted!r}")
        root = Step(wanted)
        for node in _first_of_each_topic(found):
            root.below.append(await both_ways(open_to, apis, node))
        return Traced(root)


def _asked(api: httpx.Client, path: str) -> dict[str, Any]:
    answer = api.get(path)
    if answer.is_error:
        raise Misdeclared(f"{path}: {answer.text[:300]}")
    document: dict[str, Any] = answer.json()
    return document


async def _line(
    home: Path, apis: Apis, line: Mapping[str, Any], check: Mapping[str, Any] | None
) -> Traced:
    shown = ("tenant_id", "meter", "usage_period", "quantity", "amount_minor", "currency")
    root = Step(f"invoice line {line['line_id']}", {name: line[name] for name in shown})
    root.facts["invoice_id"] = line["invoice_id"]
    root.facts["stripe_id"] = line["stripe_id"]
    usage = Step(f"usage from {line['topic']}", {"filter": line["filter"]})
    for span in line["ranges"]:
        place = f"{span['topic']}[{span['partition']}]"
        usage.below.append(Step(f"{place} positions {span['first']} to {span['last']}"))
    root.below.append(usage)
    async with connections(home) as open_to:
        samples = await _samples(open_to, line)
        usage.facts["records"] = samples.total
        for node in samples.shown:
            usage.below.append(await _upwards(open_to, apis, node))
    if check is None:
        return Traced(root)
    root.below.append(Step("recomputed from the log", dict(check)))
    return Traced(root, bool(check["equal"]))


@dataclass
class _Samples:
    total: int = 0
    shown: list[Node] = field(default_factory=list)


async def _samples(open_to: Connections, line: Mapping[str, Any]) -> _Samples:
    """How many records of the ranges the line counts, and the first few."""
    spans = {
        (span["topic"], span["partition"]): Span(span["first"] - 1, span["last"])
        for span in line["ranges"]
    }
    samples = _Samples()
    async for batch in open_to.log.read(spans):
        frame = batch.frame.with_columns(pl.Series("position", batch.positions))
        month = pl.col("occurred_at").dt.strftime("%Y-%m") == line["usage_period"]
        frame = frame.filter((pl.col("tenant_id") == line["tenant_id"]) & month)
        if line["filter"]:
            frame = frame.filter(pl.sql_expr(line["filter"]))
        samples.total += frame.height
        for row in frame.head(_SAMPLES - len(samples.shown)).to_dicts():
            samples.shown.append(Node(batch.topic, batch.partition, row.pop("position"), row))
    return samples


def _first_of_each_topic(nodes: list[Node]) -> list[Node]:
    firsts: dict[str, Node] = {}
    for node in nodes:
        firsts.setdefault(node.topic, node)
    return list(firsts.values())


async def both_ways(open_to: Connections, apis: Apis, node: Node) -> Step:
    """A record with its causes, down to what came from outside, and what it led to."""
    step = await _upwards(open_to, apis, node)
    inbox = node.topic.startswith("inbox.")
    for effect in [] if inbox else await open_to.tracer.effects(node):
        step.below.append(Step(f"led to {effect.place}", _facts(effect)))
    return step


async def _upwards(open_to: Connections, apis: Apis, node: Node) -> Step:
    """A record with its chain of causes below it; a task also with its raw events."""
    root = step = Step(node.place, _facts(node))
    chain = await open_to.tracer.causes(node)
    for before, cause in zip([node, *chain], chain, strict=False):
        if _TASK in before.record:
            step.below.append(await _raw_events(open_to, apis, before, cause))
        below = Step(f"because of {cause.place}", _facts(cause))
        step.below.append(below)
        step = below
    return root


async def _raw_events(open_to: Connections, apis: Apis, task: Node, request: Node) -> Step:
    """The vector of a task recomputed from the log, with the newest events behind each view."""
    with apis.client("inference") as api:
        versions = api.get(f"/v1/models/{task.record['model']}/versions").json()
    names = next(v["features"] for v in versions if v["version"] == task.record["version"])
    logged = struct.unpack(f"<{len(names)}f", task.record["vector"])
    computed = [name for name in names if not name.startswith("input.")]
    ask = {
        "tenant_id": task.record["tenant_id"],
        "entities": {one["name"]: one["value"] for one in request.record["entities"]},
        "features": computed,
        "as_of": task.record[_TASK].isoformat(),
    }
    with apis.client("features") as api:
        answer = api.post("/v1/explain", json=ask)
    if answer.is_error:
        raise Misdeclared(f"the features could not be explained: {answer.text[:300]}")
    found = answer.json()
    values = dict(zip(names, logged, strict=True))
    differing = [name for name in computed if not _same(values[name], found["features"][name])]
    step = Step("vector", {"columns": len(names), "equal_to_recomputed": not differing})
    if differing:
        step.facts["differing"] = differing
    for view, behind in found["events"].items():
        facts = {"entity": behind["entity"], "events": behind["events"]}
        below = Step(f"view {view}", facts)
        below.below = [await _event(open_to, one) for one in behind["newest"][-2:]]
        step.below.append(below)
    return step


async def _event(open_to: Connections, place: Mapping[str, Any]) -> Step:
    """An event behind a view; one that a transform made with the events behind it."""
    topic, at = place["topic"], (place["partition"], place["position"])
    step = Step(f"{topic}[{at[0]}]@{at[1]}")
    if topic.removeprefix("events.") in open_to.catalogue.transforms:
        node = await open_to.tracer.at(topic, *at)
        below = step
        for cause in await open_to.tracer.causes(node) if node is not None else []:
            below.below.append(Step(f"because of {cause.place}", _facts(cause)))
            below = below.below[0]
    return step


def _same(logged: float, recomputed: float | None) -> bool:
    if recomputed is None or math.isnan(logged):
        return recomputed is None and math.isnan(logged)
    return logged == recomputed


def _facts(node: Node) -> dict[str, Any]:
    """The fields of a record worth a line: no envelope twice, no bytes."""
    hidden = ("cause", "columns", "reference")
    return {
        name: value
        for name, value in node.record.items()
        if name not in hidden and value is not None and not isinstance(value, bytes)
    }


def show(found: Traced) -> None:
    """Print the tree; a pipe gets the same tree without colours."""
    console = Console(soft_wrap=True, highlight=False)
    tree = Tree(_label(found.root))
    _grow(tree, found.root)
    console.print(tree)
    if found.equal is not None:
        console.print(
            "the log gives the same line" if found.equal else "THE LOG GIVES ANOTHER LINE"
        )


def _grow(tree: Tree, step: Step) -> None:
    for below in step.below:
        _grow(tree.add(_label(below)), below)


def _label(step: Step) -> str:
    facts = " ".join(f"{k}={_short(v)}" for k, v in step.facts.items())
    text = f"{step.title}  {facts}".rstrip()
    return text.replace("[", r"\[")


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=readable)
    text = text.replace("\x1f", "/")  # between the parts of an entity's key
    return text if len(text) <= 100 else text[:97] + "..."
