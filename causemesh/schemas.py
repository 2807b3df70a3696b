"""Which Avro schemas the mesh accepts.

Refused everywhere: recursive schemas (a deep message crashes the decoder) and arrays whose items
can take zero bytes (a six-byte message then decodes to billions of items). Refused on mesh topics:
what the columnar decoder can't read, which is maps, unions other than [null, T], and one named
type used twice.
"""

from __future__ import annotations

from typing import Any

from causemesh.errors import Misdeclared

_PRIMITIVES = frozenset(["null", "boolean", "int", "long", "float", "double", "bytes", "string"])


def check_record(schema: dict[str, Any], *, columnar: bool) -> None:
    """Raise Misdeclared, saying what and where, when `schema` is not acceptable.

    `columnar` also refuses what lies outside the columnar subset.
    """
    if not isinstance(schema, dict) or schema.get("type") != "record":
        raise Misdeclared("a topic's value must be an Avro record")
    _Check(columnar).visit(schema, str(schema.get("name", "record")), ())


class _Check:
    """Walks a schema; `named` holds the types defined so far."""

    def __init__(self, columnar: bool) -> None:
        self._columnar = columnar
        self._named: dict[str, Any] = {}

    def visit(  # noqa: PLR0911 - one return a kind of type
        self, schema: Any, path: str, inside: tuple[str, ...]
    ) -> bool:
        """Whether a value can take zero bytes."""
        if isinstance(schema, str):
            return self._reference(schema, path, inside)
        if isinstance(schema, list):
            return self._union(schema, path, inside)
        if not isinstance(schema, dict) or "type" not in schema:
            raise Misdeclared(f"{path}: {schema!r} is not an Avro type")
        kind = schema["type"]
        if isinstance(kind, (dict, list)):
            return self.visit(kind, path, inside)
        if kind in ("record", "enum", "fixed"):
            return self._define(schema, kind, path, inside)
        if kind == "array":
            return self._array(schema, path, inside)
        if kind == "map":
            self._refuse(path, "maps are not columnar; use an array of {name, value} records")
            self.visit(schema["values"], f"{path}{{}}", inside)
            return False
        return self._reference(kind, path, inside)

    def _refuse(self, path: str, why: str) -> None:
        if self._columnar:
            raise Misdeclared(f"{path}: {why}")

    def _reference(self, name: str, path: str, inside: tuple[str, ...]) -> bool:
        if name in _PRIMITIVES:
            return name == "null"
        short = name.rsplit(".", 1)[-1]
        if short in inside:
            raise Misdeclared(f"{path}: {name} contains itself; recursive schemas are refused")
        if short not in self._named:
            raise Misdeclared(f"{path}: unknown type {name!r}")
        self._refuse(path, f"{name} is used twice; define it again inline under another name")
        return bool(self._named[short])

    def _union(self, branches: list[Any], path: str, inside: tuple[str, ...]) -> bool:
        if len(branches) != 2 or branches[0] != "null":
            self._refuse(path, "only unions of the form [null, T] are columnar")
        for branch in branches:
            self.visit(branch, path, inside)
        return False

    def _array(self, schema: dict[str, Any], path: str, inside: tuple[str, ...]) -> bool:
        if self.visit(schema["items"], f"{path}[]", inside):
            raise Misdeclared(f"{path}: array items that can take zero bytes are refused")
        return False

    def _define(
        self, schema: dict[str, Any], kind: str, path: str, inside: tuple[str, ...]
    ) -> bool:
        name = str(schema["name"]).rsplit(".", 1)[-1]
        if name in self._named:
            raise Misdeclared(f"{path}: {name} is defined twice")
        if kind == "record":
            fields = schema["fields"]
            empty = [self.visit(f["type"], f"{path}.{f['name']}", (*inside, name)) for f in fields]
            self._named[name] = all(empty)
        else:
            self._named[name] = kind == "fixed" and schema["size"] == 0
        return bool(self._named[name])
