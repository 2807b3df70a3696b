"""The stand-in's objects and idempotency keys, in one SQLite file."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Json = dict[str, Any]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS objects (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    kind TEXT NOT NULL,
    body TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS objects_kind ON objects (kind, seq);
CREATE INDEX IF NOT EXISTS objects_invoice ON objects (kind, json_extract(body, '$.invoice'), seq);
CREATE INDEX IF NOT EXISTS objects_customer
    ON objects (kind, json_extract(body, '$.customer'), seq);
CREATE TABLE IF NOT EXISTS keys (
    key TEXT PRIMARY KEY,
    path TEXT NOT NULL,
    fingerprint TEXT NOT NULL,
    request_id TEXT NOT NULL,
    status INTEGER NOT NULL,
    body TEXT NOT NULL,
    created_us INTEGER NOT NULL
);
CREATE INDEX IF NOT EXISTS keys_created ON keys (created_us);
"""


@dataclass(frozen=True)
class Wanted:
    """Which objects: equal fields (names from code, never from a caller) and equal metadata."""

    kind: str
    fields: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)


class Store:
    """One connection behind one lock: calls are serial, as SQLite's writers are anyway."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self.db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        # FULL also survives a power cut; NORMAL in WAL would survive only the process's death.
        self.db.execute("PRAGMA journal_mode=WAL")
        self.db.execute("PRAGMA synchronous=FULL")
        self.db.execute("PRAGMA busy_timeout=5000")
        self.db.executescript(_SCHEMA)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self.db.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing, durable when it returns."""
        with self._lock:
            self.db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self.db.execute("ROLLBACK")
                raise
            self.db.execute("COMMIT")

    @contextmanager
    def effect(self) -> Iterator[None]:
        """A part of the transaction that is undone alone when it raises."""
        self.db.execute("SAVEPOINT effect")
        try:
            yield
        except BaseException:
            self.db.execute("ROLLBACK TO effect")
            self.db.execute("RELEASE effect")
            raise
        self.db.execute("RELEASE effect")

    def add(self, body: Json) -> Json:
        """Keep a new object."""
        self.db.execute(
            "INSERT INTO objects (id, kind, body) VALUES (?, ?, ?)",
            (body["id"], body["object"], json.dumps(body)),
        )
        return body

    def replace(self, body: Json) -> Json:
        """Keep the new state of an object."""
        self.db.execute("UPDATE objects SET body = ? WHERE id = ?", (json.dumps(body), body["id"]))
        return body

    def find(self, kind: str, wanted: str) -> Json | None:
        """The object with that id, or None."""
        row = self.db.execute(
            "SELECT body FROM objects WHERE id = ? AND kind = ?", (wanted, kind)
        ).fetchone()
        return None if row is None else dict(json.loads(row[0]))

    def place(self, kind: str, wanted: str) -> int | None:
        """Where the object stands in its kind's order of creation, or None."""
        row = self.db.execute(
            "SELECT seq FROM objects WHERE id = ? AND kind = ?", (wanted, kind)
        ).fetchone()
        return None if row is None else int(row[0])

    def remove(self, wanted: Wanted) -> None:
        """Forget those objects."""
        where, values = _where(wanted)
        self.db.execute(f"DELETE FROM objects WHERE {where}", values)

    def count(self, wanted: Wanted) -> int:
        """How many there are."""
        where, values = _where(wanted)
        row = self.db.execute(f"SELECT count(*) FROM objects WHERE {where}", values).fetchone()
        return int(row[0])

    def newest(self, wanted: Wanted, limit: int, before: int | None) -> list[Json]:
        """Up to `limit` objects, newest first; `before` is a place to start under."""
        where, values = _where(wanted)
        if before is not None:
            where, values = f"{where} AND seq < ?", [*values, before]
        rows = self.db.execute(
            f"SELECT body FROM objects WHERE {where} ORDER BY seq DESC LIMIT ?", [*values, limit]
        )
        return [json.loads(body) for (body,) in rows]


def _where(wanted: Wanted) -> tuple[str, list[str | int]]:
    clauses, values = ["kind = ?"], [wanted.kind]
    for name, value in wanted.fields.items():
        clauses.append(f"json_extract(body, '$.{name}') = ?")
        values.append(value)
    for key, value in wanted.metadata.items():
        clauses.append(
            "EXISTS (SELECT 1 FROM json_each(body, '$.metadata') WHERE key = ? AND value = ?)"
        )
        values += [key, value]
    return " AND ".join(clauses), list(values)
