"""Event types that a project's own Python makes out of others, and the topics behind them.

In `catalogue.yaml` such a type names a `transform` in place of who promises its progress:

```yaml
event_types:
  aircraft_turned:
    record: AircraftTurned
    key: tail
    transform:
      file: transforms/rotations.py   # holds `async def aircraft_turned(event, table)`
      inputs: [flight_landed]         # event types, declared above
      by: tail                        # the inputs' field whose events share a table
      scope: shared                   # tenant (default): every tenant has tables of its own
```
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

from causemesh.errors import Misdeclared

TransformScope = Literal["tenant", "shared"]
_FIELDS = frozenset(["file", "function", "inputs", "by", "scope"])
_KEYS = ("string", "int", "long")


@dataclass(frozen=True)
class Transform:
    """One transform; it is called as the event type it makes, whose key is its field `key`.

    `by` is the field of every input by which events come together; `file` holds the function.
    """

    name: str
    key: str
    inputs: tuple[str, ...]
    by: str
    scope: TransformScope
    file: Path
    function: str

    @property
    def output(self) -> str:
        """The topic of what it makes."""
        return f"events.{self.name}"

    @property
    def feed(self) -> str:
        """The topic of its inputs, keyed by `by`: one order for all of them."""
        return f"transforms.{self.name}.inputs.v1"

    @property
    def state(self) -> str:
        """The compacted topic of its tables."""
        return f"transforms.{self.name}.state.v1"

    @property
    def sources(self) -> tuple[str, ...]:
        """The topics of its inputs."""
        return tuple(f"events.{name}" for name in self.inputs)


def read_transform(path: Path, name: str, entry: Mapping[str, Any]) -> Transform:
    """The transform of event type `name` in the catalogue file `path`. Raises Misdeclared."""
    told = entry["transform"]
    problem = f"{path}: {name}: transform"
    if not isinstance(told, Mapping) or not {"file", "inputs", "by"} <= set(told) <= _FIELDS:
        raise Misdeclared(f"{problem} needs file, inputs and by, and may have function and scope")
    clash = sorted({"watermark", "lateness_seconds"} & set(entry))
    if clash:
        raise Misdeclared(f"{problem}: {clash} are of its inputs, not of what it makes")
    scope = told.get("scope", "tenant")
    if scope not in get_args(TransformScope):
        raise Misdeclared(f"{problem}: scope must be one of {get_args(TransformScope)}")
    inputs = told["inputs"] if isinstance(told["inputs"], list) else [told["inputs"]]
    folder = path.parent.resolve()
    file = (folder / str(told["file"])).resolve()
    if not file.is_relative_to(folder):
        raise Misdeclared(f"{problem}: {told['file']} is outside of the project")
    return Transform(
        name,
        str(entry["key"]),
        tuple(map(str, inputs)),
        str(told["by"]),
        scope,
        file,
        str(told.get("function", name)),
    )


def require_faust(bus: str) -> None:
    """Raises Misdeclared where Faust is not installed, or can't read the mesh's broker."""
    if bus != "kafka":
        raise Misdeclared(
            "custom transforms need CAUSEMESH_BUS=kafka: Faust, which runs them, reads Kafka alone"
        )
    # once imported, Faust has put another module in its own place, which has no spec
    if "faust" not in sys.modules and find_spec("faust") is None:
        raise Misdeclared("custom transforms need Faust: pip install 'causemesh[transforms]'")


def check_input(path: Path, transform: Transform, name: str, record: Mapping[str, Any]) -> None:
    """Refuse an input without the field `by`, or one that is no key. Raises Misdeclared."""
    types = {one["name"]: one["type"] for one in record["fields"]}
    kind = types.get(transform.by)
    kinds = [one for one in (kind if isinstance(kind, list) else [kind]) if one != "null"]
    if len(kinds) != 1 or kinds[0] not in _KEYS:
        raise Misdeclared(
            f"{path}: {transform.name}: input {name} needs a field {transform.by!r} that is a"
            f" {', '.join(_KEYS)}"
        )


def topics_of(transform: Transform, entry: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The entries of its topics, as in schemas/catalogue.yaml; that of the output has no record."""
    ours: dict[str, Any] = {"owner": "features", "producers": ["features"]}
    if "partitions" in entry:
        ours["partitions"] = entry["partitions"]
    return {
        transform.feed: {
            **ours,
            "form": "fact",
            "record": "TransformInput",
            "key": transform.by,
            "consumers": ["features"],
            "sources": list(transform.sources),
            "lake": False,  # its inputs are
            "about": f"What the transform {transform.name} reads, keyed by {transform.by}.",
        },
        transform.state: {
            **ours,
            "form": "state",
            "record": "TransformRow",
            "key": transform.by,
            "consumers": ["features"],
            "lake": False,
            "about": f"The tables of the transform {transform.name}.",
        },
        transform.output: {
            **ours,
            "form": "fact",
            "key": transform.key,
            "consumers": ["features", "drift", "billing", "agents"],
            "sources": [transform.feed],
            "about": str(entry.get("about", "")),
        },
    }
