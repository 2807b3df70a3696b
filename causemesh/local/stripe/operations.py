"""What a call of the API is, apart from how it came over HTTP."""

from __future__ import annotations

import secrets
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from causemesh.local.stripe.params import Param
from causemesh.local.stripe.refusals import no_such
from causemesh.local.stripe.store import Json, Store

_ALPHABET = string.ascii_letters + string.digits


@dataclass(frozen=True)
class Call:
    """One call: its path, the id in the path ("" without one), checked parameters, seconds now."""

    store: Store
    path: str
    id: str
    params: Json
    now_s: int

    def subject(self, kind: str) -> Json:
        """The object named in the path. Raises Refused (404)."""
        body = self.store.find(kind, self.id)
        if body is None:
            raise no_such(kind, self.id, param="id", status=404)
        return body

    def named(self, kind: str, param: str) -> Json:
        """The object named in a parameter. Raises Refused (400)."""
        body = self.store.find(kind, self.params[param])
        if body is None:
            raise no_such(kind, self.params[param], param=param)
        return body


@dataclass(frozen=True)
class Operation:
    """One endpoint."""

    method: str
    path: str
    run: Callable[[Call], Json]
    params: Mapping[str, Param] = field(default_factory=dict)


def new_id(prefix: str) -> str:
    """A fresh id such as `in_...`."""
    return f"{prefix}_{''.join(secrets.choice(_ALPHABET) for _ in range(24))}"
