"""The parameters a call declares, and the check of what was sent against them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from causemesh.local.stripe.refusals import Refused

_NAME = re.compile(r"([^\[\]]+)(?:\[([^\[\]]*)\])?")
_INTEGER = re.compile(r"-?\d{1,18}")
_METADATA_KEYS = 50
_METADATA_KEY_LENGTH = 40
_METADATA_VALUE_LENGTH = 500

Value = str | dict[str, str]


@dataclass(frozen=True)
class Param:
    """One declared parameter. `clearable`: an empty string means none rather than a mistake."""

    kind: Literal["string", "integer", "boolean", "metadata", "period"] = "string"
    required: bool = False
    clearable: bool = False
    max_length: int = 5000
    least: int | None = None
    most: int | None = None
    choices: tuple[str, ...] = ()


METADATA = Param("metadata")
LIMIT = Param("integer", least=1, most=100)
PAGING = {"limit": LIMIT, "starting_after": Param()}
SEARCH = {"query": Param(required=True), "limit": LIMIT, "page": Param()}


def check(sent: Iterable[tuple[str, str]], declared: Mapping[str, Param]) -> dict[str, Any]:
    """What was sent, typed. Raises Refused for the first parameter that is wrong."""
    nested = _nest(sent)
    unknown = next((name for name in nested if name not in declared), None)
    if unknown is not None:
        raise Refused(
            f"Received unknown parameter: {unknown} (this stand-in knows here: "
            f"{', '.join(sorted(declared)) or 'none'})",
            code="parameter_unknown",
            param=unknown,
        )
    missing = next((n for n, param in declared.items() if param.required and n not in nested), None)
    if missing is not None:
        raise Refused(
            f"Missing required param: {missing}.", code="parameter_missing", param=missing
        )
    return {name: _typed(name, value, declared[name]) for name, value in nested.items()}


def _nest(sent: Iterable[tuple[str, str]]) -> dict[str, Value]:
    """`a=1` stays text, `a[b]=1` becomes a dict under `a`."""
    nested: dict[str, Value] = {}
    for name, text in sent:
        parts = _NAME.fullmatch(name)
        if parts is None:
            raise Refused(f"Invalid parameter name: {name}", code="parameter_unknown", param=name)
        head, key = parts.groups()
        if key is None:
            nested[head] = text
            continue
        under = nested.setdefault(head, {})
        if isinstance(under, str):
            raise Refused(f"{head} was sent both as a text and as a hash", param=head)
        under[key] = text
    return nested


def _typed(name: str, value: Value, param: Param) -> Any:
    if param.kind == "metadata":
        return _metadata(name, value)
    if param.kind == "period":
        return _period(name, value)
    if not isinstance(value, str):
        raise Refused(f"Invalid {param.kind}: {value}", param=name)
    if param.kind == "integer":
        return _integer(name, value, param)
    if param.kind == "boolean":
        if value not in ("true", "false"):
            raise Refused(f"Invalid boolean: {value}", param=name)
        return value == "true"
    return _string(name, value, param)


def _string(name: str, value: str, param: Param) -> str | None:
    if not value:
        if param.clearable:
            return None
        raise Refused(
            f"You passed an empty string for '{name}', which cannot be unset: leave it out",
            code="parameter_invalid_empty",
            param=name,
        )
    if len(value) > param.max_length:
        raise Refused(
            f"Invalid string: {name} must be at most {param.max_length} characters", param=name
        )
    if param.choices and value not in param.choices:
        raise Refused(f"Invalid {name}: must be one of {', '.join(param.choices)}", param=name)
    return value


def _integer(name: str, value: str, param: Param) -> int:
    refused = Refused(f"Invalid integer: {value}", code="parameter_invalid_integer", param=name)
    if _INTEGER.fullmatch(value) is None:
        raise refused
    number = int(value)
    if param.least is not None and number < param.least:
        raise refused
    if param.most is not None and number > param.most:
        raise refused
    return number


def _period(name: str, value: Value) -> dict[str, int]:
    if isinstance(value, str) or value.keys() != {"start", "end"}:
        raise Refused(f"Invalid {name}: pass {name}[start] and {name}[end]", param=name)
    both = {key: _integer(f"{name}[{key}]", text, Param("integer")) for key, text in value.items()}
    if both["end"] < both["start"]:
        raise Refused(f"Invalid {name}: it ends before it starts", param=f"{name}[end]")
    return both


def _metadata(name: str, value: Value) -> dict[str, str] | None:
    """None when all metadata is to be cleared (`metadata=`)."""
    if isinstance(value, str):
        if value:
            raise Refused(f"Invalid hash: {name}", param=name)
        return None
    if len(value) > _METADATA_KEYS:
        raise Refused(f"Metadata can have up to {_METADATA_KEYS} keys", param=name)
    for key, text in value.items():
        if not 0 < len(key) <= _METADATA_KEY_LENGTH or len(text) > _METADATA_VALUE_LENGTH:
            raise Refused(
                f"Invalid {name}[{key}]: keys have up to {_METADATA_KEY_LENGTH} characters, values "
                f"up to {_METADATA_VALUE_LENGTH}",
                param=f"{name}[{key}]",
            )
    return value


def merged(metadata: Mapping[str, str], change: Mapping[str, str] | None) -> dict[str, str]:
    """Metadata after an update: keys are set, an empty value removes its key, None removes all."""
    if change is None:
        return {}
    return {key: text for key, text in {**metadata, **change}.items() if text}
