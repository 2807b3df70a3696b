"""Idempotency keys: the first outcome under a key is the outcome for 24 hours."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from causemesh.local.stripe.refusals import Refused
from causemesh.local.stripe.store import Store

FORGOTTEN_AFTER_US = 24 * 3600 * 1_000_000
_LONGEST_KEY = 255


@dataclass(frozen=True)
class Outcome:
    """A status and the bytes of a body; `replay_of` is the request that first had it."""

    status: int
    body: str
    replay_of: str | None = None
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Keyed:
    """A request under a key."""

    key: str
    path: str
    fingerprint: str
    request_id: str


def keyed(key: str, path: str, sent: Sequence[tuple[str, str]], request_id: str) -> Keyed:
    """The request as its key sees it: the order of parameters does not matter."""
    if len(key) > _LONGEST_KEY:
        raise Refused(f"An idempotency key can have up to {_LONGEST_KEY} characters")
    digest = hashlib.sha256(json.dumps(sorted(sent)).encode()).hexdigest()
    return Keyed(key, path, digest, request_id)


class Keys:
    """What was answered under which key. `recall` and `save` run inside the effect's transaction,
    so a crash keeps both the effect and its answer, or neither.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._in_use: set[str] = set()

    @contextmanager
    def use(self, key: str) -> Iterator[None]:
        """Hold a key while its request runs. Raises Refused (409) when another one holds it."""
        if key in self._in_use:
            raise Refused(
                "There is currently another in-progress request using this Idempotency Key "
                f"({key}). Please try again later.",
                status=409,
                code="idempotency_key_in_use",
            )
        self._in_use.add(key)
        try:
            yield
        finally:
            self._in_use.discard(key)

    def recall(self, request: Keyed, now_us: int) -> Outcome | None:
        """The outcome kept under the key. Raises Refused when the key was for something else."""
        row = self._store.db.execute(
            "SELECT path, fingerprint, request_id, status, body FROM keys "
            "WHERE key = ? AND created_us > ?",
            (request.key, now_us - FORGOTTEN_AFTER_US),
        ).fetchone()
        if row is None:
            return None
        path, fingerprint, request_id, status, body = row
        if path != request.path:
            raise _misused(
                request.key, f"for the same endpoint ('{path}' before, '{request.path}' now)"
            )
        if fingerprint != request.fingerprint:
            raise _misused(request.key, "with the same parameters they were first used with")
        return Outcome(status, body, replay_of=request_id)

    def save(self, request: Keyed, outcome: Outcome, now_us: int) -> None:
        """Keep the outcome, and forget what is too old."""
        self._store.db.execute(
            "DELETE FROM keys WHERE created_us <= ?", (now_us - FORGOTTEN_AFTER_US,)
        )
        self._store.db.execute(
            "INSERT INTO keys VALUES (?, ?, ?, ?, ?, ?, ?)",
            (
                request.key,
                request.path,
                request.fingerprint,
                request.request_id,
                outcome.status,
                outcome.body,
                now_us,
            ),
        )


def _misused(key: str, how: str) -> Refused:
    return Refused(
        f"Keys for idempotent requests can only be used {how}. Try using a key other than '{key}' "
        "if you meant to execute a different request.",
        kind="idempotency_error",
    )


def replayed(outcome: Outcome) -> Outcome:
    """The outcome with the headers that say it is a replay."""
    if outcome.replay_of is None:
        return outcome
    said = {"Idempotent-Replayed": "true", "Original-Request": outcome.replay_of}
    return replace(outcome, headers={**outcome.headers, **said})
