"""What services build on, pinned: a change here is a change for every service.

A name with `=` has a default; what follows `*` goes by name only; `async` is awaited. Change this
table together with the kit, the services and the guides.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

from causemesh import admin, client, errors, log, outbox, positions_sql, runner, service

FACE = {
    runner.Batch: {
        "": "topic, partition, frame, rows, raw, bad=, promised_us=",
        "positions": "property",
        "occurred_at_us": "property",
        "without": "rows",
    },
    runner.Outgoing: {
        "": "topic, frame, keys, cause_topic, cause_partition, positions, indexes=, origins=",
    },
    runner.Emission: {"": "outgoing=, promises=, refused=, commit="},
    runner.Processor: {
        "process": "async batches, watermark_us, transaction",
        "snapshot": "",
        "restore": "state",
    },
    runner.Stage: {
        "": "service, group, shared, writes=, broadcast=",
        "inputs": "catalogue, partition",
        "sources": "catalogue, source",
    },
    runner.Limits: {
        "": "max_records=, max_wait_s=, attempts=, retry_s=, commit_every_units=, gather_s=,"
        " commit_every_s=, bulk_records=, bulk_gather_s=",
        "pause_s": "most",
    },
    service.Service: {
        "": "name, settings, *, catalogue, bus, registry, engine",
        "emitter": "writes",
        "producer": "",
        "runner": "stage, make_processor, limits=, *, store=, checkpoints=",
        "outbox": "writes",
        "serve": "async routers=, tasks=",
        "close": "async ",
    },
    client.Client: {
        "": "catalogue, registry, producer",
        "produce": "async event_type, events, *, traceparent=",
        "request": "async requests, *, traceparent=",
        "watermark": "async event_type, at",
    },
    log.LogReader: {
        "": "bus, catalogue, decoder",
        "ends": "async topics",
        "read": "async spans",
        "one": "async topic, partition, position",
    },
    log.Span: {"": "after, last"},
    outbox.Event: {"": "topic, key, record, origin=, traceparent="},
    outbox.OutboxDrain: {
        "": "service, engine, catalogue, emitter, *, spans=",
        "run": "async ",
        "drain": "async ",
    },
    positions_sql.SqlPositionStore: {
        "": "engine",
        "claim": "async group, partition",
        "unit": "claim",
        "watermark": "async group, partitions",
        "promised": "async group, inbox, partitions",
    },
    admin.Problem: {"": "status, kind, detail, **extra"},
    admin.PageParams: {"": "limit=, cursor="},
    errors.Retryable: {"": "message, *, retry_after="},
    errors.Poison: {"": "rows, *, batch="},
}
FUNCTIONS: dict[Callable[..., Any], str] = {
    service.open_service: "name, settings, *, migrated=",
    service.run_process: "main",
    outbox.add_events: "async connection, events, *, shard=",
    outbox.records_frame: "record, rows",
    client.connect: "project=, settings=",
    admin.page_of: "items, limit, key",
    admin.decode_cursor: "cursor",
    admin.create_app: "service, token, registry, probe, routers=",
}


def face(function: Callable[..., Any]) -> str:
    """Parameters as in the tables above."""
    shown: list[str] = []
    by_name = False
    for name, one in inspect.signature(function).parameters.items():
        if name == "self":
            continue
        if one.kind is one.KEYWORD_ONLY and not by_name:
            by_name = True
            shown.append("*")
        stars = "**" if one.kind is one.VAR_KEYWORD else ""
        shown.append(f"{stars}{name}{'' if one.default is one.empty else '='}")
    awaited = inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function)
    return ("async " if awaited else "") + ", ".join(shown)


def members(kind: type) -> dict[str, str]:
    """The public face of a class; "" is its constructor."""
    found = {} if getattr(kind, "_is_protocol", False) else {"": face(kind)}
    for name, member in vars(kind).items():
        if name.startswith("_"):
            continue
        if isinstance(member, property):
            found[name] = "property"
        elif inspect.isfunction(member):
            found[name] = face(member)
    return found


@pytest.mark.parametrize("kind", FACE, ids=lambda kind: kind.__name__)
def test_a_class_keeps_its_face(kind: type) -> None:
    assert members(kind) == FACE[kind]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_a_function_keeps_its_face(function: Callable[..., Any]) -> None:
    assert face(function) == FUNCTIONS[function]


def test_a_page_keeps_its_form() -> None:
    assert {name: field.is_required() for name, field in admin.Page.model_fields.items()} == {
        "items": True,
        "next_cursor": False,
    }


def test_a_processor_says_what_it_takes() -> None:
    assert set(inspect.get_annotations(runner.Processor)) == {"takes_bad_rows", "stateful"}


def test_the_runner_exports_what_services_import() -> None:
    assert set(runner.__all__) == {
        "NEVER",
        "Batch",
        "Emission",
        "Emitter",
        "Limits",
        "Observer",
        "Outgoing",
        "PartitionWorker",
        "Processor",
        "Runner",
        "Stage",
        "UnitReport",
    }


def test_a_changed_signature_is_noticed() -> None:
    async def produce(self: Any, event_type: str, events: Any, *, wait: bool = True) -> int:
        return 0

    assert face(produce) == "async event_type, events, *, wait="
    assert face(produce) != FACE[client.Client]["produce"]


@pytest.mark.parametrize(
    ("error", "parents"),
    [
        (errors.Retryable, (errors.MeshError,)),
        (errors.Poison, (errors.MeshError,)),
        (errors.Fatal, (errors.MeshError,)),
        (errors.Fenced, (errors.Fatal, errors.MeshError)),
        (errors.Misdeclared, (errors.Fatal, errors.MeshError)),
    ],
)
def test_errors_keep_their_kinds(error: type, parents: tuple[type, ...]) -> None:
    kit = [one for one in error.__mro__[1:] if one.__module__ == errors.__name__]
    assert tuple(kit) == parents
