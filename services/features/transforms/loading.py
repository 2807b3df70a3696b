"""The user's functions, loaded from the project's files."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import AsyncGenerator, Callable
from datetime import datetime
from typing import Any

from causemesh.derived import Transform
from causemesh.errors import Misdeclared
from services.features.transforms.rows import Table


class Event(dict[str, Any]):
    """The fields of an event, its envelope's too, and what it is (`type`)."""

    def __init__(self, event_type: str, fields: dict[str, Any]) -> None:
        super().__init__(fields)
        self.type = event_type

    @property
    def occurred_at(self) -> datetime:
        """Event time, UTC."""
        at: datetime = self["occurred_at"]
        return at


Function = Callable[[Event, Table], AsyncGenerator[dict[str, Any], None]]
"""Yields the fields of events to make; may change the table of the event's key."""


def load_function(transform: Transform) -> Function:
    """The function of a transform. Raises Misdeclared, naming the file, when there is none."""
    where = f"transform {transform.name}: {transform.file}"
    if not transform.file.is_file():
        raise Misdeclared(f"{where} is missing")
    spec = importlib.util.spec_from_file_location(
        f"causemesh_transform_{transform.name}", transform.file
    )
    if spec is None or spec.loader is None:
        raise Misdeclared(f"{where} is no Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise Misdeclared(f"{where} can't be loaded: {error!r}") from error
    function = getattr(module, transform.function, None)
    if not inspect.isasyncgenfunction(function):
        raise Misdeclared(
            f"{where} needs `async def {transform.function}(event, table)` that yields"
        )
    found: Function = function
    return found
