"""Lists by page: an opaque cursor that names the last item seen, so that a page never shifts."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Generic, TypeVar

from fastapi import Query
from pydantic import BaseModel

from causemesh.admin.problems import Problem

T = TypeVar("T")


class Page(BaseModel, Generic[T]):
    """One page; `next_cursor` is null on the last."""

    items: list[T]
    next_cursor: str | None = None


class PageParams:
    """The query parameters of a list: `limit` (1 to 500) and `cursor`."""

    def __init__(
        self,
        limit: Annotated[int, Query(ge=1, le=500)] = 50,
        cursor: Annotated[str | None, Query(max_length=500)] = None,
    ) -> None:
        self.limit = limit
        self.after: Any = None if cursor is None else decode_cursor(cursor)


def decode_cursor(cursor: str) -> Any:
    """The key in a cursor. Raises Problem when it is none of ours."""
    try:
        return json.loads(base64.urlsafe_b64decode(cursor.encode()))
    except (binascii.Error, ValueError):
        raise Problem(422, "invalid_cursor", "use next_cursor of the page before") from None


def page_of(items: Sequence[T], limit: int, key: Callable[[T], Any]) -> Page[T]:
    """A page from `limit + 1` rows asked for: the extra row says that there is more."""
    shown = list(items[:limit])
    more = len(items) > limit
    cursor = (
        base64.urlsafe_b64encode(json.dumps(key(shown[-1])).encode()).decode() if more else None
    )
    return Page(items=shown, next_cursor=cursor)
